"""Rows of data: what a prompt, an example, a demonstration and a pair are, and the JSONL files that hold them."""

import json
from pathlib import Path
from typing import NamedTuple, TypeVar


class Prompt(NamedTuple):
    instruction: str


class Example(NamedTuple):
    instruction: str
    label: str


class Demonstration(NamedTuple):
    instruction: str
    response: str


class Pair(NamedTuple):
    instruction: str
    chosen: str
    rejected: str


Row = TypeVar("Row", Prompt, Example, Demonstration, Pair)


def read_jsonl(path: str | Path, row: type[Row]) -> list[Row]:
    """All rows of a JSONL file as `row` (Prompt, Example, Demonstration or Pair), whose field names are the JSON keys.

    Further keys are ignored. Raises ValueError naming the file and the line for a line that is not a JSON object
    with these keys as strings, or for a file without rows; nothing is returned then. FileNotFoundError if missing.
    """
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: expected one JSON object per line, got {error}") from None
            if not isinstance(fields, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, got {type(fields).__name__}")
            for name in row._fields:
                if not isinstance(fields.get(name), str):
                    got = type(fields[name]).__name__ if name in fields else f"only {sorted(fields)}"
                    raise ValueError(f"{path}:{number}: expected a string field {name!r}, got {got}")
            rows.append(row(*(fields[name] for name in row._fields)))
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got an empty file")
    return rows


def write_jsonl(path: str | Path, rows: list[Row]) -> None:
    """Write rows as `read_jsonl` reads them."""
    with open(path, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)


def fit(prompt: list[int], response: list[int], max_len: int, name: str) -> list[int]:
    """Prompt and response in at most `max_len` tokens: the response is cut from the right, the prompt never.

    Raises ValueError naming the row where the prompt leaves no room for a response.
    """
    if len(prompt) >= max_len:
        raise ValueError(f"{name}: a prompt must leave room for a response in {max_len} tokens, got {len(prompt)}")
    return (prompt + response)[:max_len]
