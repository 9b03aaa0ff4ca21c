"""The verifiers against hand-written tables, and the labels of real data."""

import json
import sys
import threading
from fractions import Fraction

import pytest

from qrm_fast.rl.data import Example, Pair, read_rows, write_jsonl
from qrm_fast.rl.verifiers import boxed, find_number, find_verifier, math_is_right, number_is_right, read_examples


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
        # signs and currency
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("+5", "5"),
        (r"it costs \$1,200", "1200"),
        ("so 9 * 2 = $<<9*2=18>>18", "18"),
        # thousands as LaTeX and typography write them
        ("1{,}234", "1234"),
        (r"10,\!080", "10080"),
        ("1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567", "1234567"),
        # fractions and mixed numbers
        ("3/4 of it", "3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac34", "-3/4"),
        ("2 1/2 hours", "5/2"),
        (r"2\frac{1}{2}", "5/2"),
        ("in step 2 3/2", "3/2"),
        ("3/0", None),
        ("on 12/25/2024", None),
        # powers of ten
        ("1.5e3", "1500"),
        ("2E-2", "1/50"),
        (r"1.5 \times 10^{3}", "1500"),
        ("1.5 \N{MULTIPLICATION SIGN} 10^3", "1500"),
        ("10^-2", "1/100"),
        ("1e999999999", None),  # not a number of a gigabyte
        ("9" * 5000, None),
        # what has a number in it is not a number
        (r"\sqrt{2}", None),
        ("x^2", None),
        ("x2", None),
        ("x = 3^2 = 9", "9"),
    ],
)
def test_last_number(text, number):
    found = find_number(text)
    assert (None if found is None else found.value) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("#### 42\nI hope this helps with your 3 questions.", 42),
        ("#### 42 and no more than 7", 42),
        ("First #### 1\nno, #### 42\n3 checks", 42),
        ("#### Step 3: add\nso it is \\boxed{42}, 7 more", 42),  # a heading marks nothing
        (r"\boxed{\frac{3}{4}} of 8", Fraction(3, 4)),
        (r"\boxed{1} and \boxed{\text{42 cm}} of 8", 42),
        (r"\boxed{x = 42} of 8", 42),
        (r"\boxed{42x} of 8", None),
        (r"\boxed{\sqrt{42}} of 8", None),
        (r"\boxed{41, 42} of 8", None),
        (r"\boxed{42 of 8", 8),  # never closed
        ("The answer is 42 apples. There are 3 pears.", 42),
        ("The answer is 6 * 7 = 42. There are 3 pears.", 42),
        ("Answer: **$42**\nThere are 3 pears.", 42),
        ("The answer is below.\n1. add\n42", 42),
        ("The answer is \\boxed{42}. The answer is 3.", 42),
    ],
)
def test_a_marked_answer_is_the_answer(response, number):
    found = find_number(response)
    assert (None if found is None else found.value) == number


def test_nested_braces():
    assert boxed(r"\boxed{1} or \fbox{2} or \boxed{\frac{a}{\sqrt{b}} \} c} {d}") == r"\frac{a}{\sqrt{b}} \} c"
    assert boxed(r"\boxed{a \boxed{b}}") == "b"
    assert boxed("}{ {2}") is None and boxed(r"\boxed{") is None


@pytest.mark.parametrize(
    ("label", "right", "wrong"),
    [
        ("18.5", "She pays $18.50.", "18"),
        ("3/4", "1/2 + 1/4 = 3/4", "1/4"),
        ("0.75", r"\boxed{\frac{3}{4}}", "75"),
        (r"\frac{9}{7}", "9/7", "7"),
        ("1,234,567", "1234567", "567"),
        ("$70,000", "70000.00", "70"),
        ("-5", "-$5", "5"),
        ("1500", r"1.5 \cdot 10^3", "3"),
        ("1e3", "1,000", "1"),
        ("50%", "0.5", "0.05"),
        ("50%", "50", "5000%"),
        ("50", r"50\%", "0.5"),
        ("0.5", "50%", "0.5%"),
        ("5 apples", "x = 5", "no idea"),
        (r"45^\circ", "45 degrees", ""),
        ("She sells 24 and 48.\n#### 72", "72", "48"),
        ("The answer is 72.", "72", "2"),
        (r"\boxed{72}", "72", "2"),
    ],
)
def test_numbers_are_compared_by_value(label, right, wrong):
    assert number_is_right(right, label)
    assert not number_is_right(wrong, label)


@pytest.mark.parametrize(
    "label",
    ["none", "", "1, 2", "(1, 2)", "5x", r"2\sqrt{5}", r"2\pi", "x^2 + 1", "3/0", "1 or 2", r"\boxed{x}", "506_7"],
)
def test_a_label_that_is_not_one_number_is_refused(label):
    with pytest.raises(ValueError, match="label must be one number for the verifier"):
        number_is_right("3", label)


@pytest.mark.parametrize(
    "text",
    [
        "1,",
        "1 ",
        "1/",
        "{",
        "#### ",
        "answer is ",
        "\\frac",
        "\\frac{1",
        "-",
        "\\boxed{",
        "\\boxed{1}",
        "\\text{",
        "a = ",
        "1",
    ],
)
def test_no_response_takes_long(text):
    """Time linear in the length: a policy that has gone mad repeats itself to the last token."""
    responses = [text * (100_000 // len(text))] * 2
    worker = threading.Thread(target=lambda: [number_is_right(r, "18") for r in responses], daemon=True)
    worker.start()
    worker.join(60)
    assert not worker.is_alive()


def test_labels_are_checked_where_they_stand(tmp_path):
    path = tmp_path / "badlabel.jsonl"
    rows = [Example(f"{i}+1:", f"{i + 1:02d}") for i in range(9)]
    write_jsonl(path, [*rows, Example("a", "no number")])
    with pytest.raises(ValueError, match=r"badlabel.jsonl:10: label must be one number .* got 'no number'"):
        read_examples(path, "number")
    with pytest.raises(ValueError, match=r"badlabel.jsonl:10: label must be a total of two digits .* got 'no number'"):
        read_examples(path, "arithmetic")
    write_jsonl(path, rows)
    assert read_examples(path, "number") == read_examples(path, "arithmetic") == rows
    with path.open("a") as lines:
        lines.write("\n" + json.dumps({"question": "a", "answer": "2 + 3\n#### x"}))
    with pytest.raises(ValueError, match=r"badlabel.jsonl:11: label must be one number"):
        read_examples(path, "number")
    write_jsonl(path, [Pair("a", "b", "c")])
    with pytest.raises(ValueError, match=r"badlabel.jsonl:1: expected a string field 'label'"):
        read_examples(path, "number")
    with pytest.raises(ValueError, match="verifier must be one of arithmetic, number, math, got judge"):
        read_examples(path, "judge")


def test_the_verifier_math_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r'"math" needs the package math-verify, pip install .qrm_fast\[math\]'):
        find_verifier("math")


@pytest.mark.parametrize(
    ("label", "right", "wrong"),
    [
        (r"\frac{9}{7}", r"so \boxed{9/7}.", r"so \boxed{7/9}."),
        (r"2\sqrt{5}", "#### \\sqrt{20}\nwith 3 more words", "2 5"),
        ("x^2-2x+8", "The answer is $8-2x+x^2$", r"\boxed{x^2-2x}"),
        ("(3,4]", r"\boxed{(3,4]}", r"\boxed{[3,4]}"),
        ("1,-3", r"\boxed{-3, 1}", r"\boxed{1}"),
        ("Tuesday", r"\boxed{\text{Tuesday}}", r"\boxed{\text{Monday}}"),
        ("5", r"\boxed{5}, not 6", r"\boxed{5x}"),
        ("She sells 3.\n#### 72", "so 72", ""),
        ("3", r"\boxed{3}", r"\boxed{" + "(" * 3000 + "}"),
    ],
)
def test_mathematical_answers(label, right, wrong):
    pytest.importorskip("math_verify")
    assert find_verifier("math") is math_is_right
    assert math_is_right(right, label) and not math_is_right(wrong, label)
    in_a_thread = []
    worker = threading.Thread(target=lambda: in_a_thread.append(math_is_right(right, label)))
    worker.start()
    worker.join()
    assert in_a_thread == [True]


def test_a_label_that_is_no_answer_is_refused_by_math():
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="label must be a mathematical answer"):
        math_is_right("3", " ")


def test_real_labels(real_data, tmp_path):
    """Every label of GSM8K is a number, and so are 4,017 of MATH's 4,926; each is right for itself, boxed or not."""

    def taken(name):
        count = 0
        for _, label in read_rows(real_data / name, Example):
            if find_number(label, alone=True):
                assert number_is_right(label, label) and number_is_right(rf"so \boxed{{{label}}} of 7", label)
                count += 1
        return count

    assert taken("gsm8k_test.jsonl") == len(read_examples(real_data / "gsm8k_test.jsonl", "number")) == 1319
    assert taken("gsm8k_train_prompts.jsonl") == 7473
    assert taken("math_test.jsonl") == 4017
    with pytest.raises(ValueError, match=r"math_test.jsonl:\d+: label must be one number"):
        read_examples(real_data / "math_test.jsonl", "number")
    pytest.importorskip("math_verify")
    write_jsonl(tmp_path / "tenth.jsonl", read_rows(real_data / "math_test.jsonl", Example)[::10])
    assert len(read_examples(tmp_path / "tenth.jsonl", "math")) == 493
