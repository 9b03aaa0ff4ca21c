"""The arithmetic task against hand-written tables."""

from collections import Counter
from random import Random

import pytest

from qrm_fast.rl.arithmetic import (
    FORGETFUL,
    FORGOTTEN_CARRY,
    HASTY,
    ONE_TOO_MANY,
    STEP,
    THINKING,
    arithmetic_demonstration,
    arithmetic_examples,
    arithmetic_is_right,
    arithmetic_split,
    arithmetic_steps,
    arithmetic_tokenizer,
)
from qrm_fast.rl.tokenizers import encode_prompt, encode_response

RIGHT = "07+6=13\n\n13+1=14\n\n14+9=23\n\n#23"


def test_right_demonstration_of_the_table():
    assert arithmetic_demonstration("7+6+1+9:") == RIGHT
    assert arithmetic_is_right(RIGHT, "23") and not arithmetic_is_right(RIGHT, "13")
    assert not arithmetic_is_right("#23\n\n14+9=23", "23")
    for label in ("7", "#23", "23 ", "", "twenty"):
        with pytest.raises(ValueError, match="label must be a total of two digits"):
            arithmetic_is_right(RIGHT, label)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (RIGHT, [True, True, True, True]),
        ("07+6=13\n\n13+1=14\n\n14+9=13\n\n#13", [True, True, False, True]),  # the slip itself, then carried on
        ("07+6=03\n\n03+1=04\n\n04+9=13\n\n#13", [False, True, True, True]),
        ("07+6=13\n\n12+1=13\n\n13+9=22\n\n#22", [True, False, True, True]),  # a total that was never written
        ("07+6=13\n\n13+1=14\n\n14+9=23\n\n#13", [True, True, True, False]),
        ("07+6=13\n\nnonsense", [True, False]),
        ("", [False]),
        (RIGHT + "\n\n#23", [True, True, True, True, False]),
        ("?\n\n07+6=13\n\n?\n\n13+1=24\n\n24+9=33\n\n#33", [True, True, True, False, True, True]),
        (RIGHT + "\n\n?", [True, True, True, True, False]),
    ],
)
def test_steps_are_judged_from_the_total_written_before(response, right):
    assert arithmetic_steps("7+6+1+9:", response) == right


def test_splits_are_disjoint_and_hold_no_duplicate():
    sets = {split: arithmetic_examples(400, split=split, seed=3) for split in ("train", "tuning", "report")}
    prompts = [example.instruction for examples in sets.values() for example in examples]
    assert len(set(prompts)) == 3 * 400
    for split, examples in sets.items():
        assert all(arithmetic_split(example.instruction) == split for example in examples)
    assert all(sum(map(int, e.instruction[:-1].split("+"))) == int(e.label) for e in sets["report"])
    assert arithmetic_examples(5, split="train", seed=3) == sets["train"][:5]
    assert arithmetic_examples(5, split="train", seed=4) != sets["train"][:5]


def test_demonstrations_forget_carries_and_count_one_too_many():
    rng = Random(0)
    right, slips = 0, Counter()
    for instruction, label in arithmetic_examples(2000, split="train", seed=0):
        response = arithmetic_demonstration(instruction, rng)
        right += arithmetic_is_right(response, label)
        for step in response.split(STEP)[:-1]:
            before, digit, after = map(int, step.replace("+", " ").replace("=", " ").split())
            due = before % 10 + digit >= 10
            kind = -10 if due and digit in FORGETFUL else 1 if digit in HASTY else 0
            slips[kind, after - before - digit] += 1
    assert 0.35 < right / 2000 < 0.5
    assert {(kind, by) for kind, by in slips if by} == {(-10, -10), (1, 1)}
    for kind, rate in ((-10, FORGOTTEN_CARRY), (1, ONE_TOO_MANY)):
        assert abs(slips[kind, kind] / (slips[kind, kind] + slips[kind, 0]) - rate) < 0.03


def test_some_demonstrations_think():
    answers = [arithmetic_demonstration("7+6+1+9:", Random(i), thinking=0.25) for i in range(500)]
    steps = [step for answer in answers for step in answer.split(STEP)]
    thoughts = steps.count(THINKING)
    assert abs(thoughts / (len(steps) - thoughts) - 0.25) < 0.04
    assert not any(answer.endswith(THINKING) for answer in answers)
    assert arithmetic_demonstration("7+6+1+9:", Random(0)).count(STEP) == 3


def test_tokens_round_trip_and_blank_line_is_one_token():
    tokenizer = arithmetic_tokenizer()
    assert len(tokenizer) == 18
    ids = encode_response(tokenizer, "07+6=13\n\n#13")
    assert ids == [2, 9, 12, 8, 13, 3, 5, 16, 14, 3, 5, tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "07+6=13\n\n#13"
    assert tokenizer.decode([16]) == STEP
    assert encode_prompt(tokenizer, "7+6:") == [9, 12, 8, 15]
