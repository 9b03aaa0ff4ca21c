"""Verifiers: (response, label) -> whether the answer is right.

A verifier raises ValueError for a label that it cannot judge by, whatever the response, so that labels are checked when
they are read. It does not raise for a response.
"""

import re
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import NamedTuple

from .arithmetic import arithmetic_is_right
from .data import Example, Prompt, Question, Rows, read_rows


class Number(NamedTuple):
    value: Fraction
    percent: bool  # whether a percent sign follows, which `value` leaves out


DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)"
DECIMAL = rf"(?:{DIGITS}(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    rf"""
    (?=[-+.\d])  # quick to see
    (?<![\w.^_{{/\\])  # nothing that a word, an exponent, an argument or a denominator goes on with
    (?P<sign>(?<![)}}\]])[-+])?  # after a digit or a bracket it is an operation
    (?: (?:(?P<whole>\d+)\ +)?(?P<up>{DECIMAL})\s?/\s?(?P<down>{DECIMAL})
      | (?:(?P<factor>{DECIMAL})\s*\*\s*)?10\^\{{?(?P<power>[-+]?\d{{1,3}})\}}?
      | (?P<decimal>{DECIMAL})(?:[eE](?P<exponent>[-+]?\d{{1,3}}))? )
    (?P<percent>\s?%)?
    (?!\d|\.\d|,\d{{3}}(?!\d)|[eE][-+]?\d)  # nor the beginning of a longer number,
    (?!\s*(?:[=+/]|\*(?!\*)|\^(?!\{{?\\circ)|\\(?!circ|degree|quad)[a-zA-Z]))  # an operand, or a factor
    """,
    re.VERBOSE,
)
# One number and no more: a name for it may come before and a unit after.
ALONE = re.compile(
    rf"\s*(?:[a-zA-Z]\w*\s*=\s*)?{NUMBER.pattern}\s*(?:\^?\{{?(?:\\circ|\\degree|°)\}}?)?\s*"
    r"(?:(?:(?<=\s)[a-zA-Z]|[a-zA-Z]{2})[a-zA-Z\s]*(?:/\s*[a-zA-Z]+)?(?:\^\{?\d\}?)?)?\s*\.?\s*",
    re.VERBOSE,
)
HASHES = re.compile(r"####\s*")
BRACE = re.compile(r"\\f?boxed\s*\{|(?<!\\)[{}]")
ANSWER = re.compile(r"\banswer\s*(?:is|:|=)[\s:*]*", re.IGNORECASE)
FRACTION = re.compile(r"(\d?)\\[dt]?frac\s*(?:\{\s*([-+]?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))")
MAX_LENGTH = 400  # characters of an answer: a longer one is noise, and takes long to read


def plain(text: str) -> str:
    r"""LaTeX and typography of numbers as ASCII: "\$1{,}234" is 1,234, "1\frac{2}{3}" is 1 2/3, "\text{cm}" is cm."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"(?<=\d)(?:,?\\[!, ]|[\u00a0\u2009\u202f])+(?=\d{3})", ",", text)
    text = re.sub(r"\u00d7|·|\\times\b|\\cdot\b", "*", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"([-+])\s*\\?[$€£¥]\s*", r"\1", text)
    text = re.sub(r"\\?[$€£¥]|\\[()\[\]]", " ", text)
    return FRACTION.sub(lambda m: f"{m[1]}{' ' * bool(m[1])}{m[2] or m[3]}/{m[4] or m[5]}", text)


def find_number(text: str, *, alone: bool = False) -> Number | None:
    r"""The marked answer of a text, else its last number; `alone`: else the one number that is all of it.

    A mark is "####" before a number, else \boxed{}, else "answer is" (or "answer:") before a number in its line; the
    last of its kind counts. What stands in \boxed{} is the whole answer: where that is not one number, there is none.
    """
    text = plain(text)
    for mark in reversed(list(HASHES.finditer(text))):
        if match := NUMBER.match(text, mark.end()):
            return _number(match)
    box = boxed(text)
    if box is not None:
        return _alone(box)
    for said in reversed(ANSWER.split(text)[1:]):
        if match := NUMBER.search(said.partition("\n")[0]):
            return _number(match)
    if alone:
        return _alone(text)
    *_, match = None, *NUMBER.finditer(text)
    return _number(match) if match else None


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} of a text holds, braces within it included; None without one that is closed."""
    begins, last = [], None  # where what the open braces hold begins, None where it is no box
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            begins.append(brace.end() if "boxed" in brace[0] else None)
        elif begins and (begin := begins.pop()) is not None and (last is None or begin > last[0]):
            last = begin, brace.start()
    return None if last is None else text[slice(*last)]


def _alone(text: str) -> Number | None:
    match = ALONE.fullmatch(text)
    return _number(match) if match else None


def _number(match: re.Match) -> Number | None:
    """None for a denominator of zero and for digits without end."""
    if len(match[0]) > MAX_LENGTH:
        return None
    part = {
        name: Fraction(text.replace(",", "")) for name, text in match.groupdict().items() if text and text[-1].isdigit()
    }
    if match["up"]:
        if not part["down"]:
            return None
        value = part["up"] / part["down"]
        if value < 1:  # 2 1/2 is a mixed number, 2 3/2 are two numbers
            value += part.get("whole", 0)
    elif match["power"]:
        value = part.get("factor", 1) * Fraction(10) ** int(part["power"])
    else:
        value = part["decimal"] * Fraction(10) ** int(part.get("exponent", 0))
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None)


def same_number(a: Number, b: Number) -> bool:
    """Equality by value.

    Beside a number without a percent sign, 50% is one half, and also 50: a label may leave the sign out. Below one the
    number is more likely a share: 0.5% is not 0.5.
    """
    if a.percent == b.percent:
        return a.value == b.value
    percentage, number = (a.value, b.value) if a.percent else (b.value, a.value)
    return number == percentage / 100 or (number == percentage and abs(percentage) >= 1)


@lru_cache(maxsize=1 << 16)
def _label_number(label: str) -> Number:
    expected = find_number(label, alone=True)
    if expected is None:
        raise ValueError(f'label must be one number for the verifier "number" ("math" takes any answer), got {label!r}')
    return expected


def number_is_right(response: str, label: str) -> bool:
    """The marked or last number of a response is the label's by value: "#### 18" is 18, 3/4 is .75."""
    expected = _label_number(label)
    found = find_number(response)
    return found is not None and same_number(found, expected)


def math_is_right(response: str, label: str) -> bool:
    r"""The answer of a response is the label's for Math-Verify: numbers, expressions, sets, intervals, words.

    The answer is what stands in \boxed{}, else after "####", else what Math-Verify finds. One of more than 400
    characters, and one that takes more than five seconds to understand, is wrong.
    """
    from math_verify import parse, verify

    # Math-Verify keeps its time by a signal, which Python gives to the main thread alone.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    expected = parse(_formula(label) or f"${label}$", parsing_timeout=seconds)
    if not label.strip() or not expected:
        raise ValueError(f'label must be a mathematical answer for the verifier "math", got {label!r}')
    answer = _formula(response)
    if answer is not None and len(answer) > MAX_LENGTH:
        return False
    found = parse(answer or response, parsing_timeout=seconds)
    return verify(expected, found, timeout_seconds=seconds)


def _formula(text: str) -> str | None:
    """The marked answer of a text as a formula, None without a mark."""
    box = boxed(text)
    if box is None and "####" in text:
        box = text.rpartition("####")[2].strip().partition("\n")[0]
    return None if box is None else f"${box.strip(' $')}$"


VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "arithmetic": arithmetic_is_right,
    "number": number_is_right,
    "math": math_is_right,
}


def find_verifier(name: str) -> Callable[[str, str], bool]:
    """The verifier of this name in VERIFIERS. Raises ValueError for an unknown one and for a missing package."""
    if name not in VERIFIERS:
        raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {name}")
    if name == "math" and find_spec("math_verify") is None:
        raise ValueError("the verifier \"math\" needs the package math-verify, pip install 'qrm_fast[math]'")
    return VERIFIERS[name]


def read_examples(path: str | Path, verifier: str) -> Rows[Example]:
    """The examples of a file for a verifier. Raises ValueError as `read_rows` and for a label it cannot judge by."""
    is_right = find_verifier(verifier)

    def check(example: Example) -> None:
        is_right("", example.label)

    return read_rows(path, Example, check=check)


def read_prompts(path: str | Path, verifier: str, *, labelled_share: float, seed: int) -> Rows[Prompt | Example]:
    """The prompts of a file, those with a label as examples: of these a share, drawn by `seed`, the others as prompts.

    Raises as `read_examples`, but for a label that is missing.
    """
    is_right = find_verifier(verifier)

    def check(question: Question) -> None:
        if question.label is not None:
            is_right("", question.label)

    rows = read_rows(path, Question, check=check)
    labelled = [i for i, row in enumerate(rows) if row.label is not None]
    kept = set(Random(seed).sample(labelled, round(labelled_share * len(labelled))))
    prompts: list[Prompt | Example] = [
        Example(row.instruction, row.label) if row.label is not None and i in kept else Prompt(row.instruction)
        for i, row in enumerate(rows)
    ]
    return Rows(prompts, rows.places)
