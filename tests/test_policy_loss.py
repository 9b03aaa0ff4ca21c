"""policy_loss against plain autograd in float64, a table worked out by hand, and its promises about bits and masks."""

import itertools
import math

import pytest
import torch
from grids import NUM_ROWS

import qrm_fast
from qrm_fast.ops.policy_loss import _policy_loss, scaled_derivative

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [*NUM_ROWS, 3000]  # 3000 rows are three blocks of the kernel
OPTIONS = {
    "ppo": dict(kind="ppo"),
    "ppo-on-policy": dict(kind="ppo", old=False, ref=False, weights=False, entropy=False),
    "ppo-dual": dict(kind="ppo", dual_clip=1.5, clip_low=0.1, clip_high=0.3),
    "ppo-k1": dict(kind="ppo", kl_coef=0.3, kl_estimator="k1", weights=False),
    "ppo-k2": dict(kind="ppo", kl_coef=0.3, kl_estimator="k2", entropy_coef=0.1),
    "ppo-k3": dict(kind="ppo", kl_coef=0.3, kl_estimator="k3", dual_clip=3.0, entropy_coef=0.1),
    "reinforce": dict(kind="reinforce", old=False, ref=False, weights=False, entropy=False),
    "reinforce-k3": dict(kind="reinforce", kl_coef=0.3, entropy_coef=-0.1),
    "cispo": dict(kind="cispo", clip_high=0.3),
    "gspo": dict(kind="gspo", clip_low=0.1, clip_high=0.1, kl_coef=0.3),
    "gspo-dual": dict(kind="gspo", dual_clip=1.1, clip_low=0.1, clip_high=0.05, kl_coef=0.3, kl_estimator="unbiased"),
    "sapo": dict(kind="sapo", kl_coef=0.3, kl_estimator="unbiased", entropy_coef=0.1),
    "sapo-on-policy": dict(kind="sapo", old=False, weights=False),
    "gspo-on-policy": dict(kind="gspo", old=False, ref=False, weights=False, entropy=False),
}


def problem(num_tokens, dtype, *, old=True, ref=True, weights=True, entropy=True, seed=0, **options):
    """Arguments of policy_loss with every clip reached; a third of the rows masked where there are weights."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.promote_types(dtype, torch.float32)

    def normal():
        return torch.randn(num_tokens, generator=g, dtype=torch.float64)

    logprobs, advantages, entropies = (-normal().abs()).to(dtype), normal().to(acc), normal().abs().to(dtype)
    weight = torch.rand(num_tokens, generator=g, dtype=torch.float64) / max(num_tokens, 1)
    keywords = {
        "entropy": entropies if entropy else None,
        "old_logprobs": (logprobs + 0.5 * normal()).to(dtype) if old else None,
        "ref_logprobs": (logprobs + 0.2 * normal()).to(dtype) if ref else None,
        "token_weights": weight.masked_fill(normal() < -0.4, 0).to(acc) if weights else None,
    }
    if options.get("kind") == "gspo":
        cuts = torch.randint(num_tokens + 1, (num_tokens // 9,), generator=g).sort().values
        keywords["cu_seqlens"] = torch.tensor([0, *cuts, num_tokens], dtype=torch.int32)
    return logprobs, advantages, {**keywords, **options}


def oracle(
    logprobs,
    advantages,
    *,
    entropy=None,
    cu_seqlens=None,
    old_logprobs=None,
    ref_logprobs=None,
    token_weights=None,
    kind="ppo",
    clip_low=None,
    clip_high=0.2,
    dual_clip=None,
    kl_coef=0.0,
    kl_estimator="k3",
    entropy_coef=0.0,
):
    """The loss as PyTorch users write it, for autograd, and the metrics; rows of weight 0 are dropped."""
    w = torch.ones_like(logprobs) / max(len(logprobs), 1) if token_weights is None else token_weights
    clip_low = clip_low if clip_low is not None else 1.0 if kind == "cispo" else 0.2
    rows = w != 0
    w, logp, a = w[rows], logprobs[rows], advantages[rows]
    old = logp.detach() if old_logprobs is None else old_logprobs[rows]
    own = ratio = (logp - old).exp()
    if kind == "gspo":
        for mask in sequence_masks(cu_seqlens, len(rows)):
            mask = mask[rows]
            if not mask.any():
                continue
            s = (logp - old)[mask].mean().exp().detach()
            ratio = torch.where(mask, s * (logp - logp.detach()).exp(), ratio)
    if kind in ("ppo", "gspo"):
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = torch.max(-a * ratio, -a * clipped)
        if dual_clip is not None:
            loss = torch.where(a < 0, torch.min(loss, -a * dual_clip), loss)
    elif kind == "cispo":
        loss = -ratio.clamp(1 - clip_low, 1 + clip_high).detach() * a * logp
    elif kind == "sapo":
        tau = 1 + 0.05 * (a < 0).to(a.dtype)
        loss = -a * 4 / tau * torch.sigmoid(tau * (ratio - 1))
    else:
        loss = -a * logp
    kl = torch.zeros_like(logp)
    if ref_logprobs is not None:
        d = logp - ref_logprobs[rows]
        k3 = (-d).exp() - 1 + d
        kl = {"k1": d, "k2": d**2 / 2, "k3": k3, "unbiased": own * k3}[kl_estimator]
    h = torch.zeros_like(logp) if entropy is None else entropy[rows]
    loss = loss + kl_coef * kl - entropy_coef * h
    metrics = [
        (w * ((ratio < 1 - clip_low) & (a < 0))).sum(),
        (w * ((ratio > 1 + clip_high) & (a > 0))).sum(),
        (w * (own - 1 - own.log())).sum(),
        (w * kl).sum(),
        (w * ratio).sum(),
        (w * h).sum(),
        ratio.max() if rows.any() else ratio.sum(),
    ]
    return (w * loss).sum(), [m.detach() for m in metrics]


def sequence_masks(cu_seqlens, num_tokens):
    """A mask [T] for each sequence."""
    rows = torch.arange(num_tokens)
    return [(bos <= rows) & (rows < eos) for bos, eos in itertools.pairwise(cu_seqlens.tolist())]


def leaves(arguments, dtype=None):
    """The arguments, in another dtype where one is given, logprobs and entropy as leaves that collect gradients."""
    logprobs, advantages, keywords = arguments
    keywords = {k: v.to(dtype or v.dtype) if is_floating(v) else v for k, v in keywords.items()}
    if keywords["entropy"] is not None:
        keywords["entropy"] = keywords["entropy"].clone().requires_grad_()
    return (
        logprobs.to(dtype or logprobs.dtype).clone().requires_grad_(),
        advantages.to(dtype or advantages.dtype),
        keywords,
    )


def is_floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def values(loss, metrics, logprobs, entropy):
    """Loss, metrics and the gradients for an upstream gradient of 3."""
    inputs = [logprobs] if entropy is None else [logprobs, entropy]
    grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, 3), materialize_grads=True, allow_unused=True)
    return [loss.detach(), *metrics, *grads]


def ours(arguments):
    logprobs, advantages, keywords = leaves(arguments)
    out = qrm_fast.policy_loss(logprobs, advantages, **keywords)
    return values(out.loss, out.metrics, logprobs, keywords["entropy"])


def plain(arguments, dtype):
    logprobs, advantages, keywords = leaves(arguments, dtype)
    return values(*oracle(logprobs, advantages, **keywords), logprobs, keywords["entropy"])


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.vectors
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_float64_than_autograd(dtype, options):
    assert_no_further_than_autograd(dtype, SIZES, options)


def assert_no_further_than_autograd(dtype, sizes, options, num_seeds=4):
    """Root mean square over many problems: on a single sum the worse path is often right by luck.

    One rounding to the result's dtype is granted, as in accuracy.py.
    """
    acc = torch.promote_types(dtype, torch.float32)
    arguments = [problem(num_tokens, dtype, seed=seed, **options) for num_tokens in sizes for seed in range(num_seeds)]
    results = (
        zip(*map(ours, arguments), strict=True),
        zip(*(plain(a, torch.float64) for a in arguments), strict=True),
        zip(*(plain(a, acc) for a in arguments), strict=True),
    )
    for got, exact, eager in zip(*results, strict=True):
        assert [x.shape for x in got] == [x.shape for x in exact]
        assert {x.dtype for x in got} == {dtype if got[0].ndim else acc}
        got, exact, eager = (torch.cat([x.flatten() for x in xs]) for xs in (got, exact, eager))
        if dtype == torch.float64:  # the oracle is PyTorch's path and shows no error of its own
            torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-15)
        else:
            assert rms(got - exact) <= max(rms(eager - exact), torch.finfo(got.dtype).eps * rms(exact))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_agrees(options, monkeypatch):
    """What serves a device without a kernel of its own."""
    arguments = problem(257, torch.float64, **options)
    expected = ours(arguments)
    monkeypatch.setattr("qrm_fast.ops.policy_loss._policy_loss", through_reference)
    for got, want in zip(ours(arguments), expected, strict=True):
        torch.testing.assert_close(got, want)


def through_reference(logprobs, advantages, entropy, *rest):
    """The op's reference as a differentiable function of logprobs and entropy."""
    with torch.no_grad():
        loss, metrics, dlogprobs, dentropy = _policy_loss._init_fn(logprobs, advantages, entropy, *rest)
    linear = (dlogprobs * logprobs).sum() + (0 if entropy is None else (dentropy * entropy).sum())
    return loss + linear - linear.detach(), metrics, dlogprobs, dentropy


@pytest.mark.vectors
def test_table():
    """Six rows by hand: clipped above, clipped below, on the policy, bounded by dual_clip, unclipped, masked."""
    nan = math.nan
    ratio = torch.tensor([2.0, 0.5, 1.0, 4.0, 0.5, nan])
    logprobs = torch.zeros(6).masked_fill(ratio.isnan(), nan).requires_grad_()
    out = qrm_fast.policy_loss(
        logprobs,
        torch.tensor([1.0, -1.0, 2.0, -1.0, 1.0, nan]),
        old_logprobs=-ratio.log(),
        token_weights=torch.tensor([0.5, 0.25, 0.25, 0.5, 1.0, 0.0]),
        dual_clip=3.0,
    )
    # rows: -1.2, 0.8, -2, 3, -0.5
    assert out.loss.item() == pytest.approx(0.1, abs=1e-6)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0, 0, -0.5, 0, -0.5, 0]))
    assert out.metrics.clip_low.item() == 0.25
    assert out.metrics.clip_high.item() == 0.5
    assert out.metrics.approx_kl.item() == pytest.approx(1.375 - 0.25 * math.log(2), abs=1e-6)
    assert out.metrics.ratio.item() == pytest.approx(3.875)
    assert out.metrics.ratio_max.item() == pytest.approx(4)
    assert out.metrics.entropy.item() == out.metrics.ref_kl.item() == 0


@pytest.mark.vectors
def test_table_of_cispo():
    """Ratios 2 (clipped to 1.2) and 1/2 (never clipped from below); the scale has no gradient of its own."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    old = logprobs.detach() - torch.tensor([2.0, 0.5]).log()
    out = qrm_fast.policy_loss(logprobs, torch.tensor([1.0, -1.0]), old_logprobs=old, kind="cispo")
    # rows: 1.2, -1
    assert out.loss.item() == pytest.approx(0.1)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.6, 0.25]))
    assert (out.metrics.clip_low.item(), out.metrics.clip_high.item()) == (0.0, 0.5)
    assert out.metrics.ratio_max.item() == pytest.approx(2)


@pytest.mark.vectors
def test_table_of_gspo():
    """Sequences of ratios (4, 1), none and (1/4, masked, 1): s is 2 and 1/2 in every row."""
    nan = math.nan
    ratio = torch.tensor([4.0, 1.0, 0.25, nan, 1.0])
    logprobs = torch.full((5,), -1.0).masked_fill(ratio.isnan(), nan).requires_grad_()
    out = qrm_fast.policy_loss(
        logprobs,
        torch.tensor([1.0, -1.0, 1.0, nan, -1.0]),
        cu_seqlens=torch.tensor([0, 2, 2, 5]),
        old_logprobs=logprobs.detach() - ratio.log(),
        token_weights=torch.tensor([0.5, 0.5, 0.25, 0.0, 0.25]),
        kind="gspo",
    )
    # rows: -1.2, 2, -0.5, masked, 0.8
    assert out.loss.item() == pytest.approx(0.475)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0, 1, -0.125, 0, 0]))
    assert out.metrics.clip_high.item() == 0.5 and out.metrics.clip_low.item() == 0.25
    assert out.metrics.ratio.item() == pytest.approx(2.25) and out.metrics.ratio_max.item() == pytest.approx(2)
    # a token's own r: 4, 1, 1/4, 1
    assert out.metrics.approx_kl.item() == pytest.approx(0.5 * (3 - math.log(4)) + 0.25 * (math.log(4) - 0.75))


@pytest.mark.vectors
def test_table_of_gspo_with_dual_clip():
    """s = 4: with A = -1 bounded at 3, with A = 1 clipped at 1.2, no gradient; s = 2 with A = -1 is below the bound."""
    ratio = torch.tensor([4.0, 4.0, 2.0])
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    out = qrm_fast.policy_loss(
        logprobs,
        torch.tensor([-1.0, 1.0, -1.0]),
        cu_seqlens=torch.tensor([0, 2, 3]),
        old_logprobs=logprobs.detach() - ratio.log(),
        token_weights=torch.ones(3),
        kind="gspo",
        dual_clip=3.0,
    )
    # rows: 3, -1.2, 2
    assert out.loss.item() == pytest.approx(3.8, abs=1e-5)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.0, 2.0]))


@pytest.mark.vectors
def test_table_of_sapo():
    """At r = 1 the gate is 1/2, the loss -2 A / tau and the slope -A; at r = 2 and A = -1, sigmoid(1.05) = 0.74077."""
    logprobs = torch.tensor([-1.0, -1.0, -2.0], requires_grad=True)
    old = logprobs.detach() - torch.tensor([1.0, 1.0, 2.0]).log()
    out = qrm_fast.policy_loss(
        logprobs, torch.tensor([3.0, -1.0, -1.0]), old_logprobs=old, token_weights=torch.ones(3), kind="sapo"
    )
    # rows: -3 * 4 / 2, 4 / 1.05 / 2, 4 / 1.05 * 0.74077
    assert out.loss.item() == pytest.approx(-6 + 1.904762 + 2.821990, abs=2e-5)
    out.loss.backward()
    # 4 * 0.74077 * 0.25923 * 2
    torch.testing.assert_close(logprobs.grad, torch.tensor([-3.0, 1.0, 1.536243]), rtol=1e-5, atol=1e-5)
    assert out.metrics.ratio.item() == pytest.approx(4)


@pytest.mark.vectors
def test_table_of_the_unbiased_kl():
    """pi = 2 ref, r = 3: value 3 (log 2 - 1/2), slope 3 log 2; on-policy value and slope are k3's and k2's."""
    logprobs = torch.tensor([math.log(0.5), math.log(0.5)], requires_grad=True)
    options = dict(ref_logprobs=torch.full((2,), math.log(0.25)), kl_coef=0.5, kl_estimator="unbiased")
    for r, old in (3.0, logprobs.detach() - math.log(3)), (1.0, None):
        out = qrm_fast.policy_loss(logprobs, torch.zeros(2), old_logprobs=old, **options)
        assert out.loss.item() == pytest.approx(0.5 * r * (math.log(2) - 0.5), rel=1e-5)
        (gradient,) = torch.autograd.grad(out.loss, logprobs)
        assert gradient.tolist() == pytest.approx(2 * [0.25 * r * math.log(2)], rel=1e-5)


@pytest.mark.vectors
@pytest.mark.parametrize(
    "estimator, kl, slope",
    [("k1", math.log(2), 1), ("k2", math.log(2) ** 2 / 2, math.log(2)), ("k3", math.log(2) - 0.5, 0.5)],
)
def test_table_of_kl_estimators(estimator, kl, slope):
    """pi = 2 ref on one of two tokens; the gradient is that of the estimator."""
    logprobs = torch.tensor([math.log(0.5), -1.0], requires_grad=True)
    ref = torch.tensor([math.log(0.25), -1.0])
    entropy = torch.tensor([0.6, 0.2], requires_grad=True)
    out = qrm_fast.policy_loss(
        logprobs,
        torch.tensor([3.0, 0.0]),
        kind="reinforce",
        entropy=entropy,
        ref_logprobs=ref,
        kl_coef=0.5,
        kl_estimator=estimator,
        entropy_coef=0.1,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx((3 * math.log(2) + 0.5 * kl - 0.1 * 0.8) / 2)
    assert out.metrics.ref_kl.item() == pytest.approx(kl / 2)
    assert out.metrics.entropy.item() == pytest.approx(0.4)
    torch.testing.assert_close(logprobs.grad, torch.tensor([(-3 + 0.5 * slope) / 2, 0.25 if estimator == "k1" else 0]))
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.05, -0.05]))


@pytest.mark.vectors
def test_small_log_ratios_keep_their_digits():
    """(r - 1) - log r is d^2 / 2 near the policy; exp(d) - 1 - d in float32 would be rounding noise."""
    d = torch.tensor([1e-4, -1e-4])
    zero = torch.zeros(2)
    out = qrm_fast.policy_loss(d, zero, old_logprobs=zero, ref_logprobs=zero)
    assert out.metrics.approx_kl.item() == pytest.approx(5e-9, rel=1e-2)
    assert out.metrics.ref_kl.item() == pytest.approx(5e-9, rel=1e-2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    logprobs, advantages, keywords = leaves(problem(7, torch.float64, **options))
    entropy = keywords.pop("entropy")

    def loss(logprobs, entropy):
        return qrm_fast.policy_loss(logprobs, advantages, entropy=entropy, **keywords).loss

    if keywords["old_logprobs"] is None and keywords["kind"] in ("ppo", "sapo"):
        keywords["old_logprobs"] = logprobs.detach().clone()  # what None stands for; finite differences move the ratio
    if keywords["kind"] == "cispo":  # beyond the clip the scale is constant; else finite differences move it too
        keywords["old_logprobs"] = logprobs.detach() - 1
    if keywords["kind"] == "gspo":  # where A is constant, the token form has the gradient of the sequence form
        keywords["token_weights"] = None
        keywords["old_logprobs"] = logprobs.detach() - 0.01
        advantages.fill_(0.7)
    assert torch.autograd.gradcheck(loss, (logprobs, entropy))


@pytest.mark.vectors
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_masked_rows_never_leak(fill):
    assert_masked_rows_never_leak(OPTIONS["ppo-k3"], fill)


def assert_masked_rows_never_leak(options, fill):
    logprobs, advantages, keywords = problem(300, torch.float32, **options)
    masked = keywords["token_weights"] == 0
    assert masked.any() and not masked.all()
    poisoned = {
        k: v.masked_fill(masked, fill) if is_floating(v) and k != "token_weights" else v for k, v in keywords.items()
    }
    clean = ours((logprobs, advantages, keywords))
    got = ours((logprobs.masked_fill(masked, fill), advantages.masked_fill(masked, fill), poisoned))
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)
    assert (got[-1][masked] == 0).all() and (got[-2][masked] == 0).all()


@pytest.mark.vectors
def test_nan_in_a_counted_row_is_seen():
    for where in "logprobs", "advantages", "old_logprobs":
        logprobs, advantages, keywords = problem(5, torch.float32, weights=False)
        {"logprobs": logprobs, "advantages": advantages, **keywords}[where][2] = math.nan
        loss, *metrics, grad, _ = ours((logprobs, advantages, keywords))
        assert metrics[6].isnan() == (where != "advantages")
        assert loss.isnan() and grad[2].isnan() and not grad[[0, 1, 3, 4]].isnan().any()


def test_terms_of_coefficient_zero_cannot_spoil_the_loss():
    inf = torch.full((3,), math.inf)
    out = qrm_fast.policy_loss(torch.zeros(3), torch.ones(3), entropy=inf, ref_logprobs=inf)
    assert out.loss.item() == -1


@pytest.mark.vectors
def test_no_rows_and_no_counted_rows():
    for num_tokens in 0, 4:
        rows = torch.full((num_tokens,), math.nan)
        loss, *metrics, grad = ours((rows, rows, dict(entropy=None, token_weights=torch.zeros(num_tokens))))
        assert loss == 0 and not any(metrics) and (grad == 0).all()
    empty = torch.empty(0)
    assert qrm_fast.policy_loss(empty, empty).loss == 0


def test_micro_batches_add_up():
    logprobs, advantages, keywords = problem(3000, torch.float64, **OPTIONS["ppo-k3"])
    whole = qrm_fast.policy_loss(logprobs, advantages, **keywords)
    parts = []
    for rows in slice(0, 7), slice(7, 2000), slice(2000, 3000):
        part = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        parts.append(qrm_fast.policy_loss(logprobs[rows], advantages[rows], **part))
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    for name, value in whole.metrics._asdict().items():
        combine = max if name == "ratio_max" else sum
        torch.testing.assert_close(combine([getattr(p.metrics, name) for p in parts]), value)


@pytest.mark.vectors
@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_threads_or_on_other_rows():
    arguments = problem(5000, torch.float32, **OPTIONS["ppo-k3"])
    runs = []
    threads = torch.get_num_threads()
    for n in 1, 2, 3:
        torch.set_num_threads(n)
        runs.append(ours(arguments))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)
    order = torch.randperm(5000)[:1234]
    logprobs, advantages, keywords = arguments
    shuffled = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    for a, b in zip(ours((logprobs[order], advantages[order], shuffled))[-2:], runs[0][-2:], strict=True):
        assert torch.equal(a, b[order])


@pytest.mark.unpoisoned
def test_bits_of_gspo_depend_on_the_sequence_alone():
    logprobs, advantages, keywords = problem(3000, torch.float32, **OPTIONS["gspo"])
    whole = ours((logprobs, advantages, keywords))[-2]
    bounds = keywords["cu_seqlens"].tolist()
    for bos, eos in list(itertools.pairwise(bounds))[::20]:
        part = {k: v[bos:eos] if is_floating(v) else v for k, v in keywords.items()}
        part["cu_seqlens"] = torch.tensor([0, eos - bos])
        assert torch.equal(ours((logprobs[bos:eos], advantages[bos:eos], part))[-2], whole[bos:eos])


def test_passes_its_inputs_through():
    logprobs, advantages, keywords = problem(4, torch.float32)
    out = qrm_fast.policy_loss(logprobs, advantages, **keywords)
    assert out.logprobs is logprobs and out.entropy is keywords["entropy"]
    assert qrm_fast.policy_loss(logprobs, advantages).entropy is None


def test_only_the_loss_is_differentiable_and_once():
    logprobs, advantages, keywords = leaves(problem(4, torch.float32, **OPTIONS["ppo-k3"]))
    out = qrm_fast.policy_loss(logprobs, advantages, **keywords)
    assert not any(m.requires_grad for m in out.metrics)
    for x in logprobs, keywords["entropy"]:
        (grad,) = torch.autograd.grad(out.loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            grad.sum().backward()


def test_opcheck():
    logprobs, advantages, keywords = leaves(problem(5, torch.float32))
    tensors = [keywords[k] for k in ("entropy", "old_logprobs", "ref_logprobs", "token_weights")]
    for kind, (h, *rest) in itertools.product(("ppo", "gspo"), (tensors, [None] * 4)):
        cu_seqlens = torch.tensor([0, 2, 5]) if kind == "gspo" else None
        torch.library.opcheck(
            _policy_loss, (logprobs, advantages, h, *rest, cu_seqlens, kind, 0.2, 0.2, math.inf, 0.0, "k3", 0.0)
        )
    torch.library.opcheck(scaled_derivative, (torch.tensor(2.0), torch.randn(5), logprobs.detach().bfloat16()))


def test_compiles_forward_and_backward_with_one_graph_for_every_length():
    options = OPTIONS["ppo-k3"]

    @torch.compile(fullgraph=True, dynamic=True)
    def step(logprobs, advantages, entropy, old, ref, weights):
        return qrm_fast.policy_loss(
            logprobs,
            advantages,
            entropy=entropy,
            old_logprobs=old,
            ref_logprobs=ref,
            token_weights=weights,
            **options,
        )

    for num_tokens, stance in (17, "default"), (64, "fail_on_recompile"):
        arguments = problem(num_tokens, torch.float32, **options)
        logprobs, advantages, k = leaves(arguments)
        with torch.compiler.set_stance(stance):
            out = step(logprobs, advantages, k["entropy"], k["old_logprobs"], k["ref_logprobs"], k["token_weights"])
            got = values(out.loss, out.metrics, logprobs, k["entropy"])
        for a, b in zip(got, ours(arguments), strict=True):
            assert torch.equal(a, b)


def test_bad_input():
    x = torch.zeros(3)
    good = dict(logprobs=x, advantages=x)
    for error, sentence, change in [
        (ValueError, r"logprobs must be \[T\] .*, got \[3, 1\] float32", dict(logprobs=x[:, None])),
        (TypeError, r"logprobs must be \[T\] .*, got \[3\] int64", dict(logprobs=x.long())),
        (ValueError, "logprobs must be dense in its last dimension, got stride 2", dict(logprobs=torch.zeros(6)[::2])),
        (TypeError, r"advantages must be a tensor \[T\], got NoneType", dict(advantages=None)),
        (ValueError, r"advantages must be \[T\] float32 with T = 3, got \[2\]", dict(advantages=x[:2])),
        (TypeError, "advantages must be .* float32, got .* bfloat16", dict(advantages=x.bfloat16())),
        (TypeError, "old_logprobs must be .* float32, got .* float64", dict(old_logprobs=x.double())),
        (ValueError, "ref_logprobs must be on cpu", dict(ref_logprobs=x.to("meta"))),
        (TypeError, "token_weights must be .* float32, got .* bool", dict(token_weights=x.bool())),
        (TypeError, "entropy must be .* float32, got .* float16", dict(entropy=x.half())),
        (ValueError, "advantages must not require grad", dict(advantages=x.clone().requires_grad_())),
        (ValueError, "old_logprobs must not require grad", dict(old_logprobs=x.clone().requires_grad_())),
        (ValueError, "kind must be one of ppo, reinforce, cispo, gspo, sapo, got 'dpo'", dict(kind="dpo")),
        (ValueError, "cu_seqlens belong to kind 'gspo' .*, got kind 'gspo' without them", dict(kind="gspo")),
        (ValueError, "got kind 'ppo' with them", dict(cu_seqlens=torch.tensor([0, 3]))),
        (TypeError, r"cu_seqlens must be \[S\+1\] int32 or int64", dict(kind="gspo", cu_seqlens=x)),
        (ValueError, "cu_seqlens must end .* 3, got 2", dict(kind="gspo", cu_seqlens=torch.tensor([0, 2]))),
        (ValueError, "kl_estimator must be one of k1, k2, k3, unbiased, got 'abs'", dict(kl_estimator="abs")),
        (ValueError, "clip_low and clip_high must be >= 0, got -0.1 and 0.2", dict(clip_low=-0.1)),
        (ValueError, "clip_low and clip_high must be >= 0, got 0.2 and nan", dict(clip_high=math.nan)),
        (ValueError, "dual_clip must be > 1 .*, got 0.5", dict(dual_clip=0.5)),
        (ValueError, "belongs to kinds 'ppo' and 'gspo', got 3 with 'sapo'", dict(dual_clip=3, kind="sapo")),
        (ValueError, "kl_coef needs ref_logprobs, got kl_coef 0.1 without", dict(kl_coef=0.1)),
        (ValueError, "entropy_coef needs entropy, got entropy_coef 0.1 without", dict(entropy_coef=0.1)),
    ]:
        with pytest.raises(error, match=sentence):
            qrm_fast.policy_loss(**{**good, **change})


def test_a_ratio_that_would_overflow_counts_as_twenty():
    """By hand: e^20 = 4.8517e8 and e^-20 = 2.0612e-9 are the ratios; beyond them they have no gradient."""
    advantages = torch.tensor([0.0, 1.0, -1.0])
    kinds = [("ppo", {}), ("ppo", {"dual_clip": 3.0}), ("cispo", {}), ("gspo", {}), ("reinforce", {}), ("sapo", {})]
    for (kind, options), old in itertools.product(kinds, (-130.0, -30.0, -22.5, 30.0, 130.0)):
        logprobs = torch.full((3,), -2.0, requires_grad=True)
        ratio = 4.8517e8 if old < -2 else 2.0612e-9
        scale = min(ratio, 1.2)
        losses = {
            "ppo": [0.0, -scale, min(max(ratio, 0.8), options.get("dual_clip", math.inf))],
            "gspo": [0.0, -scale, max(ratio, 0.8)],
            "cispo": [0.0, 2 * scale, -2 * scale],
            "reinforce": [0.0, 2.0, -2.0],
            # sigmoid is 1 far above; far below sigmoid(-1) = 0.26894 and sigmoid(-1.05) = 0.25923
            "sapo": [0.0, -4.0, 4 / 1.05] if old < -2 else [0.0, -4 * 0.268941, 4 / 1.05 * 0.259225],
        }
        slopes = {"cispo": [0.0, -scale, scale], "reinforce": [0.0, -1.0, 1.0]}
        if kind == "gspo":
            options = options | {"cu_seqlens": torch.tensor([0, 1, 2, 3])}
        for i in range(3):
            weights = torch.zeros(3)
            weights[i] = 1.0
            loss, _, _, metrics = qrm_fast.policy_loss(
                logprobs, advantages, old_logprobs=torch.full((3,), old), token_weights=weights, kind=kind, **options
            )
            assert loss.item() == pytest.approx(losses[kind][i], rel=1e-3, abs=1e-12)
            (gradient,) = torch.autograd.grad(loss, logprobs)
            assert gradient[i].item() == pytest.approx(slopes.get(kind, [0.0, 0.0, 0.0])[i], rel=1e-3)
            assert all(x.isfinite() for x in metrics)
            assert metrics.ratio_max.item() == pytest.approx(ratio, rel=1e-3)


def test_k3_stays_finite_far_from_the_reference():
    for distance in (-120.0, -30.0, 120.0):
        logprobs = torch.full((2,), -1.0, requires_grad=True)
        options = dict(token_weights=torch.tensor([0.5, 0.5]), kl_coef=0.5, kl_estimator="k3")
        ref = torch.full((2,), -1.0 - distance)
        loss = qrm_fast.policy_loss(logprobs, torch.zeros(2), ref_logprobs=ref, **options).loss
        grown = 4.8517e8 - 1 if distance < 0 else -1.0
        assert loss.item() == pytest.approx(0.5 * (grown + distance), rel=1e-3)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert gradient.tolist() == pytest.approx(2 * [-0.25 * grown], rel=1e-3)


def test_cispo_clips_below_where_it_is_asked_to():
    """ratio 0.5, A = 1: no lower bound by default, 1 - 0.2 with clip_low 0.2."""
    logprobs = torch.full((2,), -2.0, requires_grad=True)
    options = dict(old_logprobs=logprobs.detach() - math.log(0.5), token_weights=torch.ones(2), kind="cispo")
    for clip_low, scale in ((None, 0.5), (1.0, 0.5), (0.2, 0.8), (0.6, 0.5)):
        loss = qrm_fast.policy_loss(logprobs, torch.ones(2), clip_low=clip_low, **options).loss
        assert loss.item() == pytest.approx(4 * scale, rel=1e-4)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert gradient.tolist() == pytest.approx([-scale, -scale], rel=1e-4)


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "cispo", "gspo", "sapo"])
@pytest.mark.parametrize(("clip_low", "kl_estimator"), [(0.2, "k3"), (1.0, "unbiased")])
def test_far_ratios_are_those_of_the_reference(kind, clip_low, kl_estimator):
    generator = torch.Generator().manual_seed(0)
    num_rows = 1000
    logprobs, old, ref = (60 * torch.randn(num_rows, generator=generator) for _ in range(3))
    advantages = torch.randint(-1, 2, (num_rows,), generator=generator).float()
    cu_seqlens = torch.arange(0, num_rows + 1, 4) if kind == "gspo" else None
    weights = torch.rand(num_rows, generator=generator)
    arguments = [
        logprobs,
        advantages,
        None,
        old,
        ref,
        weights,
        cu_seqlens,
        kind,
        clip_low,
        0.2,
        math.inf,
        0.1,
        kl_estimator,
        0.0,
    ]
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    for x, y in zip(_policy_loss(*arguments), _policy_loss._init_fn(*exact), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-6)
