"""Supervised fine-tuning learns, repeats its bits and does not depend on its micro-batches; the schedule's table."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qrm_fast.rl.arithmetic import arithmetic_demonstration, arithmetic_examples, arithmetic_tokenizer
from qrm_fast.rl.data import Demonstration, write_jsonl
from qrm_fast.rl.optimizer import AdamW, trapezoid
from qrm_fast.rl.sft import SFTConfig, train_sft


@pytest.fixture
def config(tmp_path):
    examples = arithmetic_examples(32, split="train", seed=0)
    rows = [Demonstration(e.instruction, arithmetic_demonstration(e.instruction)) for e in examples]
    write_jsonl(tmp_path / "demonstrations.jsonl", rows)
    return SFTConfig(
        data=str(tmp_path / "demonstrations.jsonl"),
        out=str(tmp_path / "sft"),
        overwrite=True,
        model="scratch:demo",
        tokenizer="arithmetic",
        num_steps=12,
        batch_size=16,
        lr=2e-3,
    )


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_demonstrations_are_learned_and_bits_repeat(config):
    result = train_sft(config)
    with open(f"{config.out}/metrics.jsonl") as lines:
        losses = [json.loads(line)["sft/loss"] for line in lines]
    assert len(losses) == 12 and losses[0] > 2.5 and result.loss < 2.0
    train_sft(replace(config, out=config.out + "2"))
    first, again = weights(config.out), weights(config.out + "2")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_gradient_does_not_depend_on_the_microbatches(config, monkeypatch):
    gradients, step = [], AdamW.step

    def recording_step(optimizer, lr, max_grad_norm):
        gradients.append(torch.cat([p.grad.flatten() for p in optimizer.parameters]))
        return step(optimizer, lr, max_grad_norm)

    monkeypatch.setattr(AdamW, "step", recording_step)
    for max_tokens in (8192, 150):
        train_sft(replace(config, num_steps=1, max_tokens=max_tokens))
    whole, pieces = gradients
    assert (whole - pieces).norm() <= 1e-5 * whole.norm()


def test_loss_is_the_mean_over_response_tokens(config):
    """One step on a fresh network, against transformers' own loss with the prompt masked out."""
    train_sft(replace(config, num_steps=1, batch_size=32, lr=0.0))
    with open(f"{config.out}/metrics.jsonl") as lines:
        ours = json.loads(lines.readline())["sft/loss"]
    model = AutoModelForCausalLM.from_pretrained(config.out)
    total, num_tokens = 0.0, 0
    for example in arithmetic_examples(32, split="train", seed=0):
        tokenizer = arithmetic_tokenizer()
        prompt = tokenizer(example.instruction).input_ids
        response = [*tokenizer(arithmetic_demonstration(example.instruction)).input_ids, tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            total += model(torch.tensor([prompt + response]), labels=labels).loss.item() * len(response)
        num_tokens += len(response)
    assert ours == pytest.approx(total / num_tokens, rel=1e-5)


def test_a_demonstration_over_the_budget_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(ValueError, match="max_tokens"):
        train_sft(replace(config, max_tokens=20))
    with pytest.raises(
        ValueError, match=r"demonstrations.jsonl:1: a prompt must leave room for a response in 5 tokens"
    ):
        train_sft(replace(config, max_len=5))
    assert not (tmp_path / "sft").exists()


def test_trapezoid():
    assert [trapezoid(i, 10, warmup=3, decay=0.4) for i in range(10)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )
    assert trapezoid(9, 10) == 1
