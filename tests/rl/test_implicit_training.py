"""DPO and implicit reward models: losses against their formulas, the kept reference, what they imply, bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from qrm_fast.rl.arithmetic import arithmetic_examples
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.data import Judged, Pair, write_jsonl
from qrm_fast.rl.implicit_training import DPOConfig, ImplicitConfig, train_implicit
from qrm_fast.rl.models import load_implicit, load_policy
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.tokenizers import load_tokenizer


@pytest.fixture
def configs(tmp_path):
    """Answers that end in the label are right, those that end in a zero are not."""
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, tmp_path / "policy")
    rows = arithmetic_examples(40, split="train", seed=0)
    write_jsonl(tmp_path / "pairs.jsonl", [Pair(p, f"#{label}", "#0") for p, label in rows])
    judged = [Judged(p, answer, right) for p, label in rows for answer, right in ((f"#{label}", True), ("#0", False))]
    write_jsonl(tmp_path / "judged.jsonl", judged)
    common = dict(model=str(tmp_path / "policy"), out=str(tmp_path / "rm"), overwrite=True, batch_size=16, lr=1e-3)
    return {
        "dpo": DPOConfig(data=str(tmp_path / "pairs.jsonl"), **common),
        "implicit": ImplicitConfig(data=str(tmp_path / "judged.jsonl"), **common),
    }


@pytest.mark.parametrize("kind", ["dpo", "implicit"])
def test_rewards_are_learned_and_the_reference_stays_where_it_was(configs, kind):
    config = replace(configs[kind], num_epochs=6, beta=1.0)
    result = train_implicit(config)
    assert (result.num_train, result.num_heldout) == ((34, 6) if kind == "dpo" else (68, 12))
    assert result.heldout.accuracy > 0.9 and result.heldout.margin > 0.5 and result.heldout.loss < 0.5
    first = json.loads(Path(config.out, "metrics.jsonl").read_text().splitlines()[0])
    assert first[f"{kind}/loss"] == pytest.approx(math.log(2), abs=1e-5)  # where it has not moved, every reward is 0
    tokenizer = load_tokenizer(config.out)
    model, reference, beta = load_implicit(config.out, tokenizer)
    assert beta == 1.0 and model.config.reward_model == kind
    for name, value in AutoModelForCausalLM.from_pretrained(config.model).state_dict().items():
        assert torch.equal(value, reference.state_dict()[name])


@pytest.mark.parametrize("kind", ["dpo", "implicit"])
def test_gradient_of_the_second_step_is_the_formulas_and_does_not_depend_on_the_microbatches(
    configs, kind, monkeypatch
):
    """At the first step rewards are 0; at the second the reference is another model than the one that learns."""
    config = replace(configs[kind], batch_size=1000, num_epochs=2, heldout=0.0)
    recorded, step, before = [], AdamW.step, []

    def recording_step(optimizer, lr, max_grad_norm):
        recorded.append(torch.cat([p.grad.flatten() for p in optimizer.parameters]))
        before.append([p.detach().clone() for p in optimizer.parameters])
        return step(optimizer, lr, max_grad_norm)

    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "step", recording_step)
        for max_tokens in (8192, 60):
            train_implicit(replace(config, max_tokens=max_tokens))
    for whole, pieces in zip(recorded[:2], recorded[2:], strict=True):
        assert (whole - pieces).norm() <= 1e-4 * whole.norm()

    model, reference = (AutoModelForCausalLM.from_pretrained(config.model) for _ in range(2))
    with torch.no_grad():
        for p, value in zip(model.parameters(), before[1], strict=True):
            p.copy_(value)
    tokenizer = load_tokenizer("arithmetic")

    def reward(prompt, answer):
        ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
        ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
        num = len(tokenizer(prompt).input_ids)
        logps = []
        for m in (model, reference):
            logp = m(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            logps.append(logp.gather(1, ids[0, 1:, None])[num - 1 :].sum())
        return config.beta * (logps[0] - logps[1].detach())

    losses = []
    for line in Path(config.data).read_text().splitlines():
        row = json.loads(line)
        if kind == "dpo":
            margin = reward(row["instruction"], row["chosen"]) - reward(row["instruction"], row["rejected"])
            losses.append(-F.logsigmoid(margin))
        else:
            label = torch.tensor(float(row["label"]))
            losses.append(F.binary_cross_entropy_with_logits(reward(row["instruction"], row["response"]), label))
    torch.stack(losses).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (recorded[1] - expected).norm() <= 1e-3 * expected.norm()


def test_the_reference_is_found_from_any_directory(configs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_implicit(replace(configs["dpo"], model="policy", heldout=0.0))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    load_implicit(str(tmp_path / "rm"), load_tokenizer("arithmetic"))


def test_bad_input(configs, tmp_path):
    for config in configs.values():
        with pytest.raises(ValueError, match="model must be a checkpoint, which stays as the reference, got scr"):
            train_implicit(replace(config, model="scratch:demo"))
        with pytest.raises(ValueError, match="max_tokens"):
            train_implicit(replace(config, max_tokens=10))
    with open(configs["implicit"].data, "a") as lines:
        lines.write('{"instruction": "1+1:", "response": "#02", "label": 2}\n')
    with pytest.raises(ValueError, match=r"judged.jsonl:81: labels must be true or false, 1 or 0, got 2"):
        train_implicit(configs["implicit"])
    with open(configs["dpo"].data, "a") as lines:
        lines.write('{"instruction": "1+1:", "chosen": "", "rejected": "#0"}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl:41: expected an answer in 'chosen', got an empty text"):
        train_implicit(configs["dpo"])
    assert not (tmp_path / "rm").exists()
