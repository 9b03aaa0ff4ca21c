"""Rewards on rows that are not trained on."""

import itertools
import math

import pytest
import torch

from qrm_fast import gae
from qrm_fast.integrations.rewards import onto_trainable


def test_by_hand():
    """Three sequences: observations between and behind actions, rewards before the first action, and an empty one."""
    rewards = torch.tensor([9.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 5.0])
    mask = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 0]).bool()
    got = onto_trainable(rewards, torch.tensor([0, 6, 6, 8, 9]), mask)
    assert got.tolist() == [0.0, 7.0, 0.0, 0.0, 24.0, 0.0, 0.0, 0.0, 0.0]


def test_a_terminal_reward_on_a_masked_token_reaches_the_last_action():
    """The discounted return of the first of two actions is 0.5, where gae alone sees no reward at all."""
    cu, mask = torch.tensor([0, 4]), torch.tensor([True, False, True, False])
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0])
    lost = gae(rewards, torch.zeros(4), cu, gamma=0.5, lam=1.0, mask=mask)
    found = gae(onto_trainable(rewards, cu, mask), torch.zeros(4), cu, gamma=0.5, lam=1.0, mask=mask)
    assert lost.returns.tolist() == [0.0, 0.0, 0.0, 0.0] and found.returns.tolist() == [0.5, 0.0, 1.0, 0.0]


def test_every_reward_of_a_sequence_with_an_action_in_front_is_kept():
    g = torch.Generator().manual_seed(0)
    rewards, mask = torch.randn(60, generator=g, dtype=torch.float64), torch.rand(60, generator=g) < 0.4
    bounds = [0, 20, 20, 21, 60]
    mask[[0, 20, 21]] = True
    got = onto_trainable(rewards, torch.tensor(bounds), mask)
    assert not got[~mask].any()
    for begin, end in itertools.pairwise(bounds):
        assert got[begin:end].sum().item() == pytest.approx(rewards[begin:end].sum().item())
    kept = rewards.masked_fill(~mask, 0.0)
    assert torch.equal(onto_trainable(kept, torch.tensor(bounds), mask), kept)


def test_edges():
    empty = torch.empty(0)
    assert onto_trainable(empty, torch.tensor([0]), empty.bool()).shape == (0,)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert not onto_trainable(torch.full((3,), math.nan), torch.tensor([0, 3]), nothing).any()
    with pytest.raises(TypeError, match=r"mask must be \[T\] bool, got \[3\] int64"):
        onto_trainable(torch.zeros(3), torch.tensor([0, 3]), nothing.long())
