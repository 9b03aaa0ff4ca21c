"""The demo end to end with a handful of steps: what it writes, prints and returns."""

import json
from dataclasses import replace
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from qrm_fast.rl import demo as demo_module
from qrm_fast.rl.arithmetic import (
    arithmetic_demonstration,
    arithmetic_examples,
    arithmetic_is_right,
    arithmetic_split,
    arithmetic_tokenizer,
)
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.data import Demonstration, Example, Pair, read_rows
from qrm_fast.rl.demo import demo, process_demo, sample_pairs
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.rollout import Rollout
from qrm_fast.rl.tokenizers import encode_response


@pytest.fixture
def small(monkeypatch):
    """Every phase shortened to a step or two."""
    short = dict(num_iterations=1, num_prompts=4, eval_samples=1, max_new_tokens=8)
    monkeypatch.setattr(demo_module, "SFT", replace(demo_module.SFT, num_steps=2, batch_size=8))
    monkeypatch.setattr(demo_module, "RL", replace(demo_module.RL, **short))
    monkeypatch.setattr(
        demo_module, "FORMS", {name: replace(form, **short) for name, form in demo_module.FORMS.items()}
    )
    monkeypatch.setattr(demo_module, "Q_RM", replace(demo_module.Q_RM, num_epochs=1))
    monkeypatch.setattr(demo_module, "PAIR_PROMPTS", 12)
    monkeypatch.setattr(demo_module, "NUM_REPORT_PROMPTS", 8)
    monkeypatch.setattr(demo_module, "NUM_RL_PROMPTS", 16)
    monkeypatch.setattr(demo_module, "NUM_LOCATED_PROMPTS", 2)  # to an untrained policy every token is a choice


def test_everything_is_written_printed_and_returned(small, tmp_path, capsys, monkeypatch):
    def some_pairs(directory, examples, seed):
        rows = [(e.instruction, arithmetic_demonstration(e.instruction)) for e in examples]
        return [Pair(instruction, right, right[:-1]) for instruction, right in rows], 1.0

    monkeypatch.setattr(demo_module, "sample_pairs", some_pairs)
    result = demo(seeds=1, controls=True, out=str(tmp_path))
    assert [run.reward for run in result.runs] == ["Q-RM", "random reward", "verifier, RLOO", "Q-RM, shuffled"]
    folder = tmp_path / "seed0"
    for name in ("policy", "verifier", "random", "shuffled"):
        assert (folder / name / "metrics.jsonl").exists()
        AutoModelForCausalLM.from_pretrained(folder / name)
    AutoModelForTokenClassification.from_pretrained(folder / "q_rm")
    located = result.located
    assert located.num_answers == 2 and located.prompt in {
        e.instruction for e in read_rows(folder / "report.jsonl", Example)
    }
    assert len(located.right.tokens) == len(located.right.advantages) == len(located.wrong.advantages) + 1
    assert located.right.tokens[-1] == "<eos>"
    printed = capsys.readouterr().out
    for word in ("sft", "pairs", "q-rm", "held out", "tokens/s", "verifier, RLOO", "sampled Pass@1", "gain", "±"):
        assert word in printed
    assert [line.split()[0] for line in result.summary.splitlines()[1:]] == ["trained", "gained", "next"]
    # what is reported on was not trained on
    for name, row, split in (
        ("demonstrations", Demonstration, "train"),
        ("pairs", Pair, "train"),
        ("prompts", Example, "train"),
        ("report", Example, "report"),
    ):
        rows = read_rows(folder / f"{name}.jsonl", row)
        assert {arithmetic_split(x.instruction) for x in rows} == {split}


def test_the_demo_of_pure_trains_both_forms_from_one_start(small, tmp_path, capsys):
    result = process_demo(seeds=1, out=str(tmp_path))
    assert [run.reward for run in result.runs] == ["min-form", "sum-form"]
    assert result.runs[0].before == result.runs[1].before
    for name, operator in (("min-form", "soft"), ("sum-form", "sum")):
        assert json.loads((tmp_path / "seed0" / name / "options.json").read_text())["operator"] == operator
    rows = read_rows(tmp_path / "seed0/demonstrations.jsonl", Demonstration)
    assert any("?" in row.response for row in rows)
    assert "steps per answer" in capsys.readouterr().out


def test_pairs_are_right_against_different_wrong_answers_to_the_same_prompt(monkeypatch, tmp_path):
    examples = arithmetic_examples(8, split="train", seed=0)
    tokenizer = arithmetic_tokenizer()
    slips = Random(0)

    class Answers:
        """For the first example none is right, for the second none is wrong, for the third one is unfinished."""

        def __init__(self, *_):
            pass

        def generate(self, prompts, *, num_samples, **_):
            texts = [
                arithmetic_demonstration(example.instruction, slips if i != 1 and j % 2 else None)
                for i, example in enumerate(examples)
                for j in range(num_samples)
            ]
            texts = ["#" if i < num_samples else text for i, text in enumerate(texts)]
            return Rollout([encode_response(tokenizer, text) for text in texts], [], [True] * len(texts))

    monkeypatch.setattr(demo_module, "TransformersEngine", Answers)
    save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, tmp_path)
    pairs, tokens_per_s = sample_pairs(str(tmp_path), examples, seed=0)
    labels = dict(examples)
    assert tokens_per_s > 0 and len(pairs) > 4
    assert {pair.instruction for pair in pairs} <= {example.instruction for example in examples[2:]}
    for pair in pairs:
        assert arithmetic_is_right(pair.chosen, labels[pair.instruction])
        assert not arithmetic_is_right(pair.rejected, labels[pair.instruction])
    assert len(set(pairs)) == len(pairs)
