"""The padded functions against what TRL, verl and OpenRLHF document, written down as loops over one row at a time."""

import math

import pytest
import torch

from qrm_fast.integrations import padded

MASKS = {"bool": torch.bool, "int64": torch.int64, "int32": torch.int32, "float": torch.float32}


def batch(num_rows=7, width=23, seed=0):
    """Rewards, values and a mask with padding on either side, holes, a row without tokens and a row without padding."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(num_rows, width, dtype=torch.bool)
    for i in range(2, num_rows):
        first, last = sorted(torch.randint(width + 1, (2,), generator=g).tolist())
        mask[i, first:last] = torch.rand(last - first, generator=g) < 0.7
    mask[1] = True
    rewards, values = (torch.randn(num_rows, width, generator=g) for _ in range(2))
    return rewards, values, mask


def whitened(x, mask, restore):
    """Over the rows of the mask: shifted to mean 0 and scaled to unbiased variance 1; the mean put back on request."""
    chosen = [x[i, j].item() for i, j in mask.nonzero().tolist()]
    mean = math.fsum(chosen) / len(chosen)
    variance = math.fsum((v - mean) ** 2 for v in chosen) / (len(chosen) - 1)
    return (x - mean) / math.sqrt(variance + 1e-8) + (mean if restore else 0)


def gae_of_the_mask(rewards, values, mask, gamma, lam):
    """Tokens that the mask hides are as if they were not there."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for i in range(len(mask)):
        following, carried = 0.0, 0.0
        for j in reversed(mask[i].nonzero()[:, 0].tolist()):
            delta = rewards[i, j] + gamma * following - values[i, j]
            carried = delta + gamma * lam * carried
            following = values[i, j]
            advantages[i, j], returns[i, j] = carried, carried + values[i, j]
    return advantages, returns


@pytest.mark.parametrize("mask_dtype", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("seed", range(3))
def test_gae_of_verl(mask_dtype, seed):
    rewards, values, mask = batch(seed=seed)
    advantages, returns = padded.compute_gae_advantage_return(rewards, values, mask.to(mask_dtype), 0.97, 0.9)
    want, want_returns = gae_of_the_mask(rewards.double(), values.double(), mask, 0.97, 0.9)
    want = whitened(want, mask, restore=False)
    torch.testing.assert_close(advantages[mask].double(), want[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns[mask].double(), want_returns[mask], rtol=1e-5, atol=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_of_verl_by_hand():
    """Rewards 1 and 3 around a hidden 100: deltas 3 - 2 = 1 and 1 + 2 - 1 = 2, advantages 3 and 1 before whitening."""
    nan = math.nan
    rewards, values = torch.tensor([[1.0, 100.0, 3.0, nan]]), torch.tensor([[1.0, 50.0, 2.0, nan]])
    advantages, returns = padded.compute_gae_advantage_return(rewards, values, torch.tensor([[1, 0, 1, 0]]), 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([[0.5**0.5, 0.0, -(0.5**0.5), 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[4.0, 0.0, 3.0, 0.0]]))


@pytest.mark.parametrize("masked", [True, False])
def test_gae_of_openrlhf(masked):
    """Hidden tokens have reward and value 0 but are steps of the recurrence, also in the results."""
    rewards, values, mask = batch()
    got = padded.get_advantages_and_returns(values, rewards, mask.long() if masked else None, 0.97, 0.9)
    keep = mask if masked else torch.ones_like(mask)
    r, v = rewards.double() * keep, values.double() * keep
    want = gae_of_the_mask(r, v, torch.ones_like(mask), 0.97, 0.9)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("mask_dtype", MASKS.values(), ids=MASKS)
def test_whitening(restore, mask_dtype):
    values, _, mask = batch()
    values = 5 + 3 * values.masked_fill(~mask, math.nan)
    got = padded.masked_whiten(values, mask.to(mask_dtype), shift_mean=not restore)
    torch.testing.assert_close(got[mask].double(), whitened(values.double(), mask, restore)[mask], rtol=1e-5, atol=1e-5)
    assert not got[~mask].any()


AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def aggregated(loss, mask, mode, ranks, tokens, sequences, factor):
    """Of one rank's rows; sequences without a token count nowhere."""
    rows = [(loss[i][mask[i]].sum(), int(mask[i].sum())) for i in range(len(mask)) if mask[i].any()]
    tokens = tokens or sum(n for _, n in rows)
    sequences = sequences or len(rows)
    total = sum(x / n if mode == "seq-mean-token-mean" else x for x, n in rows)
    divided = {
        "token-mean": tokens,
        "token-sum": 1,
        "seq-mean-token-sum": sequences,
        "seq-mean-token-sum-norm": sequences * (factor or loss.shape[1]),
        "seq-mean-token-mean": sequences,
    }
    return total / divided[mode] * ranks


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("given", [{}, {"dp_size": 4, "batch_num_tokens": 301, "global_batch_size": 40}])
@pytest.mark.parametrize("factor", [None, 11])
def test_aggregation_of_verl(mode, given, factor):
    loss, _, mask = batch()
    loss.requires_grad_()
    got = padded.agg_loss(loss, mask.float(), mode, loss_scale_factor=factor, **given)
    wide = loss.detach().double().requires_grad_()
    numbers = (given.get(k) for k in ("dp_size", "batch_num_tokens", "global_batch_size"))
    ranks, tokens, sequences = numbers
    want = aggregated(wide, mask, mode, ranks or 1, tokens, sequences, factor)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    grads = torch.autograd.grad(got, loss)[0], torch.autograd.grad(want, wide)[0]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-7)


def test_aggregation_needs_global_counts_on_several_ranks():
    x = torch.ones(2, 3)
    for mode, name in ("token-mean", "batch_num_tokens"), ("seq-mean-token-mean", "global_batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be given for '{mode}' where dp_size is 2, got None"):
            padded.agg_loss(x, x, mode, dp_size=2)
    with pytest.raises(ValueError, match="mode must be one of"):
        padded.agg_loss(x, x, "median")


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_softmax(sliced, dtype):
    """One label per row or K; a slice as trainers pass it; value and gradient as log_softmax in float64."""
    g = torch.Generator().manual_seed(0)
    whole = (3 * torch.randn(3, 6, 50, generator=g)).to(dtype).requires_grad_()
    logits = whole[:, :-1] if sliced else whole
    labels = torch.randint(50, (*logits.shape[:2], 4), generator=g)
    row_mask = torch.rand(logits.shape[:2], generator=g) < 0.7
    wide = whole.detach().double().requires_grad_()
    z = wide[:, :-1] if sliced else wide
    upstream = torch.randn(labels.shape, generator=g, dtype=torch.float64)
    logp, cooler = z.log_softmax(-1), (z / 0.7).log_softmax(-1)
    one, keep = labels[..., 0], row_mask[..., None]
    cases = [
        (padded.logprobs_from_logits(logits, one), logp.gather(-1, one[..., None])[..., 0]),
        (padded.selective_log_softmax(logits, one), logp.gather(-1, one[..., None])[..., 0]),
        (padded.selective_log_softmax(logits, labels, 0.7), cooler.gather(-1, labels)),
        (
            padded.selective_log_softmax(logits, one, row_mask=row_mask.long()),
            logp.gather(-1, one[..., None])[..., 0].where(row_mask, 0),
        ),
        (
            padded.selective_log_softmax(logits, labels, row_mask=keep.expand_as(labels)),
            logp.gather(-1, labels).where(keep, 0),
        ),
        (padded.entropy_from_logits(logits), -(logp.exp() * logp).sum(-1)),
        (padded.entropy_from_logits(logits[0]), -(logp.exp() * logp).sum(-1)[0]),
    ]
    for got, want in cases:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        up = upstream.flatten()[: want.numel()].view(want.shape)
        grad = torch.autograd.grad(got, whole, up.float(), retain_graph=True)[0]
        exact = torch.autograd.grad(want, wide, up, retain_graph=True)[0]
        limit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), exact, rtol=limit, atol=limit)


def test_columns_may_hold_tokens_of_probability_zero():
    logits = torch.tensor([[-math.inf, 0.0, 0.0]])
    got = padded.selective_log_softmax(logits, torch.tensor([[0, 1]]))
    torch.testing.assert_close(got, torch.tensor([[-math.inf, -math.log(2)]]))


def test_signatures_are_those_of_the_frameworks():
    """Called by keyword, as their callers do."""
    x, labels, ones = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    padded.logprobs_from_logits(logits=x, labels=labels, inplace_backward=False)
    padded.selective_log_softmax(logits=x, index=labels, temperature=1.0, row_mask=None)
    padded.entropy_from_logits(logits=x, chunk_size=1)
    padded.masked_whiten(values=ones, mask=ones, shift_mean=True)
    options = dict(token_level_rewards=ones, values=ones, response_mask=ones)
    padded.compute_gae_advantage_return(**options, gamma=1.0, lam=1.0)
    padded.get_advantages_and_returns(values=ones, rewards=ones, action_mask=ones, gamma=1.0, lambd=1.0)
    options = dict(batch_num_tokens=2, global_batch_size=1, loss_scale_factor=1)
    padded.agg_loss(loss_mat=ones, loss_mask=ones, loss_agg_mode="token-mean", dp_size=1, **options)
