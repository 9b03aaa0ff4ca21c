"""Weights of tokens by the policy's own entropy and by its distance to the sampler, against the loss they stand for."""

import math
import sys

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
    cu_seqlens = torch.tensor([0, 1, 4])
    packed = Packed([None, None], torch.arange(2), cu_seqlens, torch.zeros(2), SAMPLED, None, None, 0)
    return weigh_tokens(policy, packed, ADVANTAGES, config)


@pytest.mark.parametrize(("share", "kept"), [(0.5, [0, 1, 0, 1]), (0.25, [0, 1, 0, 0]), (0.01, [0, 1, 0, 0])])
def test_the_tokens_of_highest_entropy_count(share, kept):
    advantages, old, metrics = weighed(top_entropy=share)
    assert torch.equal(advantages, ADVANTAGES * torch.tensor(kept)) and torch.equal(old, SAMPLED) and not metrics


@pytest.mark.parametrize(
    ("importance", "bound", "log_weights", "above"),
    [  # old - sampled is .5; 0, -.1 and 2, together 1.9
        ("truncate-token", 2.0, [0.5, 0.0, -0.1, math.log(2)], 1),
        ("mask-token", 2.0, [0.5, 0.0, -0.1, -math.inf], 1),
        ("truncate-sequence", 2.0, [0.5, math.log(2), math.log(2), math.log(2)], 3),
        ("mask-sequence", 2.0, [0.5, -math.inf, -math.inf, -math.inf], 3),
        ("truncate-sequence", 7.0, [0.5, 1.9, 1.9, 1.9], 0),
        ("mask-sequence", 1.5, [-math.inf, -math.inf, -math.inf, -math.inf], 4),
    ],
)
def test_an_importance_weight_multiplies_the_loss(importance, bound, log_weights, above):
    advantages, old, metrics = weighed(importance=importance, max_importance=bound)
    weights = torch.tensor(log_weights).exp()
    torch.testing.assert_close(advantages, ADVANTAGES * weights)
    assert torch.equal(old, OLD)
    assert metrics["rollout/importance_above"] == above / 4
    assert metrics["rollout/importance_mean"].item() == pytest.approx(weights.mean().item(), rel=1e-6)
    new = OLD + torch.tensor([0.5, -0.5, 0.1, 0.0])
    got = policy_loss(new, advantages, old_logprobs=old, token_weights=torch.ones(4)).loss
    want = policy_loss(new, ADVANTAGES, old_logprobs=OLD, token_weights=weights).loss
    torch.testing.assert_close(got, want)


def test_the_importance_of_an_infinite_ratio_is_bounded_and_nan_is_not_hidden(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SAMPLED", torch.tensor([-1.5, -2.0, -1e4, math.nan]))
    weights = weighed(importance="truncate-token")[0] / ADVANTAGES
    assert weights[2] == 2 and weights[3].isnan() and weights[:2].isfinite().all()
    assert weighed(importance="mask-token")[0][2] == 0
