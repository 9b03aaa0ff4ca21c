"""AdamW: float32 whatever the parameters, and clipped gradients."""

import copy

import pytest
import torch

from qrm_fast.rl.optimizer import AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_small_updates_add_up(dtype):
    """Each is far below the last bit of a bfloat16."""
    p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = AdamW([p])
    for _ in range(1000):
        p.sum().backward()
        optimizer.step(lr=1e-5, max_grad_norm=10.0)
        assert p.grad is None
    assert (p - 0.99).abs().max() <= max(1e-4, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_torch_on_float32_parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3, generator=generator).to(dtype)) for _ in range(2)]
    theirs = [torch.nn.Parameter(p.detach().float()) for p in ours]
    optimizer, plain = AdamW(ours, betas=(0.9, 0.95)), torch.optim.AdamW(theirs, betas=(0.9, 0.95), weight_decay=0.0)
    for lr in 0.1, 0.3:
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(5, 3, generator=generator).to(dtype)
            q.grad = p.grad.float().clone()
        norm = optimizer.step(lr, max_grad_norm=1.0)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
        plain.param_groups[0]["lr"] = lr
        plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.to(dtype), rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_stays():
    used, unused = (torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = AdamW([used, unused])
    used.sum().backward()
    optimizer.step(0.5, max_grad_norm=1.0)
    assert (used < 1).all() and (unused == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, poison):
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    broken, whole = AdamW([p]), AdamW([q])
    for gradient in ([0.5, 1.0, -1.0], [poison, 1.0, 1.0], [1.0, 0.25, 0.5]):
        p.grad, finite = torch.tensor(gradient, dtype=dtype), torch.tensor(gradient).isfinite().all()
        norm = broken.step(0.1, max_grad_norm=1.0)
        assert norm.isfinite() == finite and p.isfinite().all()
        if finite:
            q.grad = torch.tensor(gradient, dtype=dtype)
            whole.step(0.1, max_grad_norm=1.0)
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_steps", [0, 2])
def test_another_optimiser_goes_on_from_its_state(dtype, num_steps):
    """Before the first step, too, when AdamW itself has none."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, generator=generator).to(dtype) for _ in range(4)]
    p, q = (torch.nn.Parameter(torch.full((3,), x, dtype=dtype)) for x in (1.0, 7.0))
    first, second = AdamW([p]), AdamW([q])
    for gradient in gradients[:num_steps]:
        p.grad = gradient.clone()
        first.step(0.1, max_grad_norm=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in gradients[num_steps:]:
        p.grad, q.grad = gradient.clone(), gradient.clone()
        first.step(0.1, max_grad_norm=1.0)
        second.step(0.1, max_grad_norm=1.0)
    assert torch.equal(p, q) and not torch.equal(p, torch.ones_like(p))
