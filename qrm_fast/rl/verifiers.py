"""Verifiers: (response, label) -> whether the answer is right."""

import re
from collections.abc import Callable
from decimal import Decimal

from .arithmetic import arithmetic_is_right

NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> Decimal | None:
    """The last number of a text: "so $1,234,567.50." gives 1234567.5; a minus after a digit is a subtraction."""
    numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def number_is_right(response: str, label: str) -> bool:
    """Equality of the last numbers by value, as GSM8K is judged: "18.50" is right for "18.5", "#### 18" is 18."""
    expected = last_number(label)
    if expected is None:
        raise ValueError(f"label must hold a number, got {label!r}")
    return last_number(response) == expected


VERIFIERS: dict[str, Callable[[str, str], bool]] = {"arithmetic": arithmetic_is_right, "number": number_is_right}


def find_verifier(name: str) -> Callable[[str, str], bool]:
    """The verifier of this name in VERIFIERS. Raises ValueError for an unknown one."""
    if name not in VERIFIERS:
        raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {name}")
    return VERIFIERS[name]
