"""The files of examples/ that plug into other trainers, against the published signatures of their hooks.

torchrl (`make test-openrlhf` installs it, too) and accelerate are used where they are installed. slime, AReaL, prime-rl
and SkyRL, which asks for Ray, do not install beside a CPU: what calls their examples here is a stand-in with the hook's
published signature.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qrm_fast import policy_loss

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(monkeypatch, name, **content):
    """A module of this dotted name and its packages."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


def test_slime():
    """No answer, one that ends in tool output, and one of a single token: by hand at gamma = lambda = 1."""
    none = torch.tensor([])
    rollout = {
        "rewards": [5.0, 1.0, 2.0],
        "loss_masks": [none, torch.tensor([1, 0, 1, 0]), torch.tensor([1])],
        "values": [none, torch.tensor([0.5, 9.0, 0.25, 9.0]), torch.tensor([1.0])],
        "kl": [none, torch.tensor([0.0, 7.0, 1.0, 7.0]), torch.tensor([0.0])],
        "response_lengths": [0, 4, 1],
    }
    load("slime_advantages").advantages(SimpleNamespace(gamma=1.0, lambd=1.0, kl_coef=0.5), rollout)
    assert [x.tolist() for x in rollout["returns"]] == [[], [0.5, 0.0, 0.5, 0.0], [2.0]]
    assert [x.tolist() for x in rollout["advantages"]] == [[], [0.0, 0.0, 0.25, 0.0], [1.0]]
    rollout["token_rewards"] = [none, torch.tensor([0.0, 0.0, 2.0, 0.0]), torch.tensor([0.0])]
    load("slime_advantages").advantages(SimpleNamespace(gamma=1.0, lambd=1.0, kl_coef=0.5), rollout)
    assert rollout["returns"][1].tolist() == [2.5, 0.0, 2.5, 0.0]


def test_skyrl(monkeypatch):
    registered = {}

    def register(name):
        return lambda function: registered.setdefault(name, function)

    path = "skyrl.backends.skyrl_train.utils.ppo_utils"
    stand_in(monkeypatch, path, register_advantage_estimator=register, register_policy_loss=register)
    load("skyrl_registry")
    estimator, loss = registered["qrm_gae"], registered["qrm_ppo"]
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 2.0, 0.0, 0.0]])
    options = dict(index=None, grpo_norm_by_std=True, config=None)
    advantages, returns = estimator(
        token_level_rewards=rewards, response_mask=mask, values=torch.zeros(2, 4), gamma=0.5, lambd=1.0, **options
    )
    assert returns.tolist() == [[0.5, 0.0, 1.0, 0.0], [1.0, 2.0, 0.0, 0.0]]
    chosen = returns[mask.bool()]
    torch.testing.assert_close(advantages[mask.bool()], (chosen - chosen.mean()) / chosen.std())

    logp = torch.tensor([[-1.0, -9.0, -2.0, -9.0], [-1.0, -1.0, -9.0, -9.0]], requires_grad=True)
    old = logp.detach() - torch.tensor([[2.0, 1.0, 1.0, 1.0], [0.5, 4.0, 1.0, 1.0]]).log()
    a = torch.tensor([[1.0, 5.0, 2.0, 5.0], [-1.0, -1.0, 5.0, 5.0]])
    config = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.2, clip_ratio_c=3.0)
    value, metrics = loss(logp, old, a, config, loss_mask=mask.float(), rollout_logprobs=None)
    # -1.2, -2, 0.8 and 4 bounded at 3
    assert value.item() == pytest.approx(0.6, abs=1e-5)
    assert metrics["clip_ratio"] == pytest.approx(0.5)
    value.backward()
    assert logp.grad.flatten().tolist() == pytest.approx([0, 0, -2, 0, 0, 0, 0, 0], abs=1e-5)


def test_areal():
    """A packed micro-batch of two sequences: the mean over the trained rows, against policy_loss of those alone."""
    example = load("areal_loss")
    g = torch.Generator().manual_seed(0)
    logp, old, a, entropy = (torch.randn(7, generator=g) for _ in range(4))
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 0])
    data = dict(logprobs=old, advantages=a, loss_mask=mask, cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32))
    rows = mask.bool()
    for options in {}, {"kind": "cispo", "clip_high": 4.0}, {"entropy_coef": 0.1}:
        logits = dict(vocab_min_logits=entropy, vocab_max_logits=entropy)
        got = example.qrm_loss(logp.requires_grad_(), entropy, data, **logits, **options)
        want = policy_loss(logp[rows], a[rows], entropy=entropy[rows], old_logprobs=old[rows], **options).loss
        torch.testing.assert_close(got, want)
    assert example.num_trained_tokens(data) == 4
    near = logp.detach() + 0.1
    got = example.qrm_loss(logp, entropy, {**data, "prox_logp": near}, kind="gspo")
    bounds = torch.tensor([0, 2, 4])
    want = policy_loss(logp[rows], a[rows], old_logprobs=near[rows], kind="gspo", cu_seqlens=bounds).loss
    torch.testing.assert_close(got, want)


def test_prime_rl(monkeypatch):
    @dataclass
    class LossInputs:
        trainer_logprobs: torch.Tensor
        inference_logprobs: torch.Tensor
        ref_logprobs: torch.Tensor | None
        advantages: torch.Tensor
        loss_mask: torch.Tensor
        loss_weights: torch.Tensor | None

    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict

    stand_in(monkeypatch, "prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)
    example = load("prime_rl_loss")
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    ratio = torch.tensor([2.0, 0.5, 9.0])
    inputs = LossInputs(
        logp, logp.detach() - ratio.log(), None, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([True, True, False]), None
    )
    out = example.qrm_loss(inputs)
    assert out.loss.item() == pytest.approx(-1.2 - 0.5) and out.metrics["clip_high"].item() == pytest.approx(0.5)
    inputs.loss_weights = torch.tensor([10.0, 1.0, 1.0])
    assert example.qrm_loss(inputs).loss.item() == pytest.approx(-12 - 0.5)
    assert example.qrm_loss(inputs, kind="gspo").loss.isfinite()


def test_torchrl():
    """Loss and gradient of GRPOLoss and its kin are those of torchrl's own computation."""
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from torchrl.modules.distributions.discrete import LLMMaskedCategorical
    from torchrl.objectives import llm

    example = load("torchrl_grpo")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=g)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    actions = torch.randint(11, (2, 5), generator=g).masked_fill(~mask, -100)

    class Actor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(logits.clone())
            self.in_keys, self.out_keys = ["tokens"], ["log_probs"]

        def _get_rlhf_dist(self, tensordict):
            return LLMMaskedCategorical(self.logits, mask)

        get_dist = _get_rlhf_dist

    data = {
        ("tokens", "full"): actions,
        "advantage": torch.randn(2, 5, 1, generator=g),
        ("log_probs", "full"): torch.randn(2, 5, generator=g).sub(2).masked_fill(~mask, 0.0),
        ("next", "reward"): torch.zeros(2, 5, 1),
    }
    for ours, theirs in (
        (example.FastGRPOLoss, llm.GRPOLoss),
        (example.FastDAPO, llm.DAPO),
        (example.FastCISPOLoss, llm.CISPOLoss),
    ):
        results = []
        for kind in ours, theirs:
            actor = Actor()
            loss = kind(actor, masking_strategy="rlhf", entropy_coeff=0.01)
            out = loss(TensorDict(data, batch_size=[2]))
            total = out.loss_objective + out.loss_entropy
            total.backward()
            grads = [p.grad for p in loss.parameters() if p.grad is not None]
            results.append((total.detach(), grads[0]))
        torch.testing.assert_close(results[0], results[1])


def test_accelerate_loop():
    """It learns to repeat the prompt's token."""
    pytest.importorskip("accelerate")
    shares = load("accelerate_loop").main(iterations=30)
    assert sum(shares[:3]) / 3 < 0.1 < 0.3 < sum(shares[-3:]) / 3
