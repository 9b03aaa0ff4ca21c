"""The arithmetic task, the readers and the verifiers against hand-written tables."""

import json
from collections import Counter
from decimal import Decimal
from random import Random

import pytest

from qrm_fast.rl.arithmetic import (
    FORGOTTEN_CARRY,
    LARGE_DIGIT,
    SMALL_DIGIT,
    SPURIOUS_CARRY,
    STEP,
    arithmetic_demonstration,
    arithmetic_examples,
    arithmetic_is_right,
    arithmetic_split,
    arithmetic_steps,
    arithmetic_tokenizer,
)
from qrm_fast.rl.data import Demonstration, Example, Pair, read_jsonl, write_jsonl
from qrm_fast.rl.tokenizers import encode_prompt, encode_response, load_tokenizer
from qrm_fast.rl.verifiers import last_number, number_is_right

RIGHT = "07+6=13\n\n13+1=14\n\n14+9=23\n\n#23"


def test_right_demonstration_of_the_table():
    assert arithmetic_demonstration("7+6+1+9:") == RIGHT
    assert arithmetic_is_right(RIGHT, "23") and not arithmetic_is_right(RIGHT, "13")
    assert not arithmetic_is_right("#23\n\n14+9=23", "23")


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


def test_demonstrations_forget_carries_and_make_some_up():
    rng = Random(0)
    right, carries = 0, Counter()
    for instruction, label in arithmetic_examples(2000, split="train", seed=0):
        response = arithmetic_demonstration(instruction, rng)
        right += arithmetic_is_right(response, label)
        for step in response.split(STEP)[:-1]:
            before, digit, after = map(int, step.replace("+", " ").replace("=", " ").split())
            due = before % 10 + digit >= 10
            size = "large" if digit >= LARGE_DIGIT else "small" if digit <= SMALL_DIGIT else "middle"
            carries[due, size, after == before + digit] += 1
            assert after in (before + digit, before + digit + (-10 if due else 10))
    assert 0.45 < right / 2000 < 0.6
    slips = {(True, "large"): FORGOTTEN_CARRY, (False, "small"): SPURIOUS_CARRY}
    for due, size in ((due, size) for due in (True, False) for size in ("large", "middle", "small")):
        is_right, is_wrong = carries[due, size, True], carries[due, size, False]
        assert abs(is_wrong / (is_right + is_wrong) - slips.get((due, size), 0.0)) < 0.03


def test_tokens_round_trip_and_blank_line_is_one_token():
    tokenizer = arithmetic_tokenizer()
    assert len(tokenizer) == 17
    ids = encode_response(tokenizer, "07+6=13\n\n#13")
    assert ids == [2, 9, 12, 8, 13, 3, 5, 16, 14, 3, 5, tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "07+6=13\n\n#13"
    assert tokenizer.decode([16]) == STEP
    assert encode_prompt(tokenizer, "7+6:") == [9, 12, 8, 15]


def test_chat_template_is_used_where_there_is_one():
    tokenizer = load_tokenizer("bpe", ["hello there"])
    plain = encode_prompt(tokenizer, "hello")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    assert tokenizer.decode(plain) == "hello"
    assert tokenizer.decode(encode_prompt(tokenizer, "hello")) == "<user>hello!"


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="a prompt must have at least one token, got none for the instruction ''"):
        encode_prompt(arithmetic_tokenizer(), "")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so $1,234,567.50.", "1234567.50"),
        ("1,234,567", "1234567"),
        ("18.50", "18.5"),
        ("Therefore 5 apples. Note 3 left", "3"),
        ("10-5", "5"),
        ("it is -7 degrees", "-7"),
        ("it is \N{MINUS SIGN}7 degrees", "-7"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("1,234, and", "1234"),
        ("#### 18", "18"),
        ("about .5", ".5"),
        ("12,3456", "3456"),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value():
    assert number_is_right("She pays $18.50.", "18.5")
    assert number_is_right("1,234,567", "1234567")
    assert not number_is_right("567", "1,234,567")
    assert not number_is_right("no idea", "3")
    with pytest.raises(ValueError, match="label must hold a number, got 'none'"):
        number_is_right("3", "none")


def test_rows_survive_writing_and_reading(tmp_path):
    for rows in (
        [Example("1+1:", "02"), Example("ü\n", "x")],
        [Pair("p", "good", "bad")],
        [Demonstration("p", "r")],
    ):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        assert read_jsonl(tmp_path / "rows.jsonl", type(rows[0])) == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "chosen": "b"', r"pairs.jsonl:2: expected one JSON object per line, got"),
        ('["a"]', r"pairs.jsonl:2: expected a JSON object, got list"),
        ('{"instruction": "a", "chosen": "b"}', r"pairs.jsonl:2: expected a string field 'rejected', got only \['ch"),
        ('{"instruction": "a", "chosen": 3, "rejected": "c"}', r":2: expected a string field 'chosen', got int"),
    ],
)
def test_malformed_line_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(Pair("p", "good", "bad")._asdict()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_jsonl(path, Pair)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl: expected at least one row, got an empty file"):
        read_jsonl(tmp_path / "empty.jsonl", Example)
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl"):
        read_jsonl(tmp_path / "missing.jsonl", Example)
