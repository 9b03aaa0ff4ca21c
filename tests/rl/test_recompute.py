"""Activation checkpointing: the same bits of fewer activations."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from qrm_fast import pack
from qrm_fast.rl import recompute
from qrm_fast.rl.config import preset
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.recompute import recomputed
from qrm_fast.rl.tokenizers import load_tokenizer
from qrm_fast.rl.train import train

sys.path.append(str(Path(__file__).parent))
from test_architectures import build
from test_train import config, same_bits, weights  # noqa: F401


def learned(policy, batch):
    """The loss, the gradients, and the numbers that the forward pass kept for them."""
    kept, num_actions = {}, len(batch.action_index)

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    policy.zero_grad()
    with saved_tensors_hooks(keep, lambda x: x):
        loss = policy.loss(batch, torch.linspace(-1, 1, num_actions), kind="reinforce").loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)], sum(kept.values())


@pytest.mark.parametrize("family", ["Llama", "Gemma 2", "Qwen3-MoE", "StableLM"])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_same_bits_of_fewer_activations(family, share_prompts):
    model = build(family)
    model.set_attn_implementation("qrm_packed")
    policy = Policy(model.train())
    sequences = [[2, 3, 4, *range(5, 5 + n)] for n in (3, 9, 6)]
    batch = pack(sequences, [3] * 3, share_prompts=share_prompts)
    plain, num_kept = learned(policy, batch)
    with recomputed(model):
        lean, num_lean = learned(policy, batch)
    assert all(map(torch.equal, plain, lean)) and len(plain) == len(lean)
    assert num_lean < 0.7 * num_kept
    assert learned(policy, batch)[1] == num_kept  # as before


def test_training_has_the_same_bits(config, monkeypatch):  # noqa: F811
    """Of a policy and of a critic; sampling keeps its keys and values."""
    config = replace(config, **preset("qrm-released", "ppo"), num_iterations=2, lr=1e-4)
    calls, checkpoint = [], recompute.checkpoint

    def counted(layer, *inputs, **options):
        calls.append(layer.args[0])
        return checkpoint(layer, *inputs, **options)

    monkeypatch.setattr(recompute, "checkpoint", counted)
    plain = train(config)
    assert not calls
    lean = train(replace(config, recompute=True, out=config.out + "2"))
    assert same_bits(weights(lean.directory), weights(plain.directory))
    model = load_policy(config.model, load_tokenizer(config.model))
    assert len(set(map(id, calls))) == 2 * model.config.num_hidden_layers


def test_a_model_of_other_layers_is_refused():
    with (
        pytest.raises(ValueError, match=r"recompute needs layers .*, Linear has none"),
        recomputed(torch.nn.Linear(2, 2)),
    ):
        pass
