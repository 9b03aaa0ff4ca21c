"""Ops without a derivative: results that are constants, an error where one is differentiated, eager and compiled."""

import weakref

import pytest
import torch

from qrm_fast import gae, implicit_rewards

CU = torch.tensor([0, 3, 3, 7])
REWARDS = torch.arange(7.0)


def advantages(values: torch.Tensor) -> torch.Tensor:
    return gae(REWARDS, values, CU).advantages


@pytest.fixture(params=["eager", "compiled"])
def run(request):
    return torch.compile(fullgraph=True) if request.param == "compiled" else lambda f: f


def test_raises_when_differentiated(run):
    values = torch.ones(7, requires_grad=True)
    result = run(advantages)(values)
    assert torch.equal(result, advantages(values.detach()))
    with pytest.raises(RuntimeError, match=r"qrm_fast\.gae\.default is not differentiable"):
        result.sum().backward()


def test_a_detached_result_is_a_constant_of_the_loss(run):
    values = torch.ones(7, requires_grad=True)
    run(lambda values: (advantages(values).detach() * values).sum())(values).backward()
    assert torch.equal(values.grad, advantages(values.detach()))


def test_requires_no_gradient_where_nothing_asks_for_one(run):
    values = torch.ones(7, requires_grad=True)
    assert not run(advantages)(values.detach()).requires_grad
    with torch.no_grad():
        assert not run(advantages)(values).requires_grad


def test_constants_may_be_inference_tensors_or_one_tensor_twice(run):
    with torch.inference_mode():
        rewards = REWARDS + 1
    values = torch.ones(7, requires_grad=True)
    assert gae(rewards, values, CU).advantages.requires_grad
    frozen = torch.ones(7)
    result = run(lambda values: (implicit_rewards(frozen, frozen) * gae(frozen, values, CU).returns).detach() * values)
    torch.testing.assert_close(result(values), torch.zeros(7))


def test_holds_on_to_no_constant():
    values, rewards = torch.ones(7, requires_grad=True), REWARDS.clone()
    result = gae(rewards, values, CU).advantages
    gone = weakref.ref(rewards)
    del rewards
    assert gone() is None
    assert result.requires_grad


def test_raises_under_a_functional_transform():
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda values: advantages(values).sum())(torch.ones(7))
