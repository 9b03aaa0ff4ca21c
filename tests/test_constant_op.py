"""Ops without a derivative: results that are constants, an error where one is differentiated, eager and compiled."""

import pytest
import torch

from qrm_fast import gae, linear_q_values

CU = torch.tensor([0, 3, 3, 7])
REWARDS = torch.arange(7.0)


def advantages(values: torch.Tensor) -> torch.Tensor:
    return gae(REWARDS.to(values.device), values, CU.to(values.device)).advantages


@pytest.fixture(params=["eager", "compiled"])
def run(request):
    return torch.compile(fullgraph=True) if request.param == "compiled" else lambda f: f


def test_raises_when_differentiated(run, device):
    values = torch.ones(7, requires_grad=True, device=device)
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


def test_a_constant_may_be_an_inference_tensor():
    with torch.inference_mode():
        rewards = REWARDS + 1
    assert gae(rewards, torch.ones(7, requires_grad=True), CU).advantages.requires_grad


def test_a_constant_may_be_passed_twice(run):
    """One frozen head for the policy and for Q."""
    hidden, weight, targets = (
        torch.randn(4, 8, requires_grad=True),
        torch.randn(5, 8),
        torch.zeros(4, dtype=torch.int64),
    )

    def loss(hidden):
        q = linear_q_values(hidden, weight, hidden.detach(), weight, targets)
        return (q.expected_q.detach() * hidden[:, 0]).sum()

    run(loss)(hidden).backward()
    expected = linear_q_values(hidden.detach(), weight, hidden.detach(), weight, targets).expected_q
    torch.testing.assert_close(hidden.grad[:, 0], expected)


def test_saves_no_constant():
    saved = []
    values = torch.ones(7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = gae(REWARDS, values, CU, bootstrap=torch.ones(3)).advantages
    assert result.requires_grad
    [x] = saved
    assert x.data_ptr() == values.data_ptr()


def test_raises_under_a_functional_transform():
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda values: advantages(values).sum())(torch.ones(7))
