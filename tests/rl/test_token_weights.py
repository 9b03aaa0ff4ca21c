"""Weights of tokens by the policy's own entropy and by its distance to the sampler, against the loss they stand for."""

import pytest
import torch

from qrm_fast import TokenLogprobs, policy_loss
from qrm_fast.rl.config import Config
from qrm_fast.rl.rewards import Packed
from qrm_fast.rl.token_weights import weigh_tokens

OLD = torch.tensor([-1.0, -2.0, -0.5, -3.0])
SAMPLED = torch.tensor([-1.5, -2.0, -0.4, -5.0])
ENTROPY = torch.tensor([0.3, 0.9, 0.1, 0.5])
ADVANTAGES = torch.tensor([1.0, -1.0, 2.0, 0.5])


def weighed(**options):
    """Two micro-batches, of one action and of three."""
    passes = iter([TokenLogprobs(OLD[:1], ENTROPY[:1], ENTROPY[:1]), TokenLogprobs(OLD[1:], ENTROPY[1:], ENTROPY[1:])])

    def policy(batch, *, temperature):
        assert temperature == 0.7
        return next(passes)

    config = Config(model="", data="", out="", temperature=0.7, **options)
    packed = Packed([None, None], torch.arange(2), torch.tensor([0, 1, 4]), torch.zeros(2), SAMPLED, None, None, 0)
    return weigh_tokens(policy, packed, ADVANTAGES, config)


@pytest.mark.parametrize(("share", "kept"), [(0.5, [0, 1, 0, 1]), (0.25, [0, 1, 0, 0]), (0.01, [0, 1, 0, 0])])
def test_the_tokens_of_highest_entropy_count(share, kept):
    advantages, old = weighed(top_entropy=share)
    assert torch.equal(advantages, ADVANTAGES * torch.tensor(kept)) and torch.equal(old, SAMPLED)


def test_a_truncated_importance_weight_multiplies_the_loss():
    """exp(old - sampled) is e^0.5, 1, e^-0.1 and e^2, which is cut at 2."""
    advantages, old = weighed(max_importance=2.0)
    weights = torch.tensor([0.5, 0.0, -0.1, 2.0]).exp().clamp(max=2.0)
    torch.testing.assert_close(advantages, ADVANTAGES * weights)
    assert torch.equal(old, OLD)
    new = OLD + torch.tensor([0.5, -0.5, 0.1, 0.0])
    got = policy_loss(new, advantages, old_logprobs=old, token_weights=torch.ones(4)).loss
    want = policy_loss(new, ADVANTAGES, old_logprobs=OLD, token_weights=weights).loss
    torch.testing.assert_close(got, want)
