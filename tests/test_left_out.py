"""What docs/integrations.md says to write instead of an option that was left out: each against the option's formula."""

import pytest
import torch

import qrm_fast

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.5, 1.0])


def rows(seed=0, num_rows=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(num_rows, generator=g, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "cispo", "sapo"])
def test_rollout_weights_go_into_the_advantages(kind):
    """They weigh the policy's term and neither the KL nor the entropy, as verl's rollout_is_weights."""
    logp, old, ref, advantages = rows()
    weights = WEIGHTS.double()
    options = dict(old_logprobs=old, kind=kind, token_weights=torch.full((5,), 0.2, dtype=torch.float64))
    kl = dict(ref_logprobs=ref, kl_coef=0.3)
    leaf = logp.clone().requires_grad_()
    got = qrm_fast.policy_loss(leaf, advantages * weights, **options, **kl).loss
    apart = logp.clone().requires_grad_()
    terms = [
        qrm_fast.policy_loss(apart[i : i + 1], advantages[i : i + 1], old_logprobs=old[i : i + 1], kind=kind).loss
        for i in range(5)
    ]
    d = apart - ref
    want = 0.2 * (weights * torch.stack(terms) + 0.3 * ((-d).exp() - 1 + d)).sum()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, y)[0] for x, y in ((got, leaf), (want, apart))))


def test_straight_through_k3_has_the_gradient_of_k2():
    logp, _, ref, advantages = rows()
    leaf = logp.clone().requires_grad_()
    options = dict(ref_logprobs=ref, kl_coef=0.3, kl_estimator="k2", kind="reinforce")
    got = torch.autograd.grad(qrm_fast.policy_loss(leaf, advantages, **options).loss, leaf)[0]
    d = leaf - ref
    k3, k2 = (-d).exp() - 1 + d, d * d / 2
    want = torch.autograd.grad((-advantages * leaf + 0.3 * (k3.detach() + k2 - k2.detach())).mean(), leaf)[0]
    torch.testing.assert_close(got, want)


def test_a_loss_of_ones_own_through_the_head():
    """Any function of log-probabilities and entropy, in four GEMMs: here sapo with other temperatures, and |d|."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=g), torch.randn(9, 4, generator=g)
    targets = torch.randint(9, (6,), generator=g)
    advantages, old, ref = (torch.randn(6, generator=g) for _ in range(3))

    def loss(logp):
        tau = torch.where(advantages > 0, 1.0, 2.0)
        gate = torch.sigmoid(tau * ((logp - old).exp() - 1)) * 4 / tau
        return (-gate * advantages + 0.1 * (logp - ref).abs()).mean()

    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    got = loss(qrm_fast.linear_logprobs(leaves[0], weight, targets).logprobs)
    want = loss((leaves[1] @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x, leaf in zip((got, want), leaves, strict=True)))


def test_a_differentiable_lse():
    """lse = z[target] - log p[target], and token_q gathers z[target]: the z-loss with all three gradients."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((6, 4), (9, 4), (9,)))
    targets = torch.randint(9, (6,), generator=g)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = qrm_fast.linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.7)
    lse = qrm_fast.token_q(hidden, weight, targets, bias=bias) / 0.7 - out.logprobs
    torch.testing.assert_close(lse.detach(), out.lse)
    want = ((hidden @ weight.T + bias) / 0.7).logsumexp(-1)
    for got, exact in zip(
        torch.autograd.grad(lse.square().mean(), inputs),
        torch.autograd.grad(want.square().mean(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


def test_a_logit_scale_and_a_keep_mask():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=g), torch.randn(9, 4, generator=g)
    keep = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1]).bool()
    targets = torch.tensor([0, 1, 3, 5, 6, 7])
    bias = torch.zeros(9).masked_fill(~keep, -torch.inf)
    out = qrm_fast.linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.7 / 0.0625)
    z = (0.0625 * hidden @ weight.T / 0.7).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(out.logprobs, z.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    capped = qrm_fast.linear_logprobs(0.0625 * hidden, weight, targets, softcap=0.2)
    z = 0.2 * torch.tanh(0.0625 * hidden @ weight.T / 0.2)
    torch.testing.assert_close(capped.logprobs, z.log_softmax(-1).gather(-1, targets[:, None])[:, 0])


def test_a_discount_per_step():
    """gamma_t: scale by the product of those before t, run with gamma 1, and scale back."""
    rewards, values, gammas, _ = rows(num_rows=6)
    gammas = gammas.sigmoid()
    so_far = torch.cat([gammas.new_ones(1), gammas[:-1]]).cumprod(0)
    out = qrm_fast.gae(so_far * rewards, so_far * values, torch.tensor([0, 6]), gamma=1.0, lam=0.9)
    carried, following, want = 0.0, 0.0, []
    for t in reversed(range(6)):
        carried = rewards[t] + gammas[t] * following - values[t] + gammas[t] * 0.9 * carried
        following = values[t]
        want.insert(0, carried)
    torch.testing.assert_close(out.advantages / so_far, torch.stack(want))


def test_a_truncated_episode_inside_a_row():
    """A sequence per episode, with the value behind its cut as bootstrap."""
    rewards, values, following, _ = rows(num_rows=6)
    out = qrm_fast.gae(rewards, values, torch.tensor([0, 4, 6]), gamma=0.9, lam=0.8, bootstrap=following[[3, 5]])
    want = []
    for begin, end in (0, 4), (4, 6):
        carried, part = 0.0, []
        for t in reversed(range(begin, end)):
            after = following[t] if t == end - 1 else values[t + 1]
            carried = rewards[t] + 0.9 * after - values[t] + 0.9 * 0.8 * carried
            part.insert(0, carried)
        want += part
    torch.testing.assert_close(out.advantages, torch.stack(want))


def test_other_standard_deviations_of_groups():
    """n answers to each prompt: a factor on grpo's advantages."""
    rewards, n = rows(num_rows=12)[0], 4
    advantages = qrm_fast.group_advantages(rewards, torch.arange(3).repeat_interleave(n), kind="grpo", eps=0.0)
    groups = rewards.view(3, n)
    population = (groups - groups.mean(1, keepdim=True)) / groups.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(advantages * (n / (n - 1)) ** 0.5, population.flatten())
    others = (groups.sum(1, keepdim=True) - groups) / (n - 1)
    leave_one_out = (groups - others) / groups.std(1, keepdim=True)
    torch.testing.assert_close(advantages * n / (n - 1), leave_one_out.flatten())


def test_what_a_token_had_and_a_value_clip_fraction():
    """Ratio, KL and loss of single tokens come from the log-probabilities that every loss returns."""
    logp, old, ref, advantages = rows()
    out = qrm_fast.policy_loss(logp, advantages, old_logprobs=old, ref_logprobs=ref)
    ratio = (out.logprobs - old).exp()
    torch.testing.assert_close(ratio.mean(), out.metrics.ratio)
    d = out.logprobs - ref
    torch.testing.assert_close((torch.expm1(-d) + d).mean(), out.metrics.ref_kl)
    values, before, returns = logp, old, ref
    clipped = before + (values - before).clamp(-0.2, 0.2)
    fraction = ((clipped - returns).square() > (values - returns).square()).double().mean()
    leaf = values.clone().requires_grad_()
    qrm_fast.value_loss(leaf, returns, old_values=before, clip=0.2).backward()
    assert (leaf.grad == 0).double().mean() == fraction > 0
