"""Rows of data: what a prompt, an example, a demonstration and a pair are, and the files that hold them."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar


class Message(NamedTuple):
    role: str  # one of ROLES
    content: str


ROLES = ("system", "developer", "user", "assistant", "tool")
Instruction = str | tuple[Message, ...]  # a text, or a conversation up to the turn that is asked for


class Prompt(NamedTuple):
    instruction: Instruction


class Example(NamedTuple):
    instruction: Instruction
    label: str


class Question(NamedTuple):
    instruction: Instruction
    label: str | None = None  # None where nobody knows the answer


class Demonstration(NamedTuple):
    instruction: Instruction
    response: str


class Pair(NamedTuple):
    instruction: Instruction
    chosen: str
    rejected: str


class Judged(NamedTuple):
    instruction: Instruction
    response: str
    label: bool  # whether the response is right


class Solution(NamedTuple):
    instruction: Instruction
    steps: tuple[str, ...]
    labels: tuple[bool, ...]  # whether each step is right


Row = TypeVar("Row", Prompt, Example, Question, Demonstration, Pair, Judged, Solution)
T = TypeVar("T")

# The names a field may have in a file: ours, TRL's, GSM8K's. A row with several of them is read by the first.
COLUMNS = {
    "instruction": ("instruction", "prompt", "question"),
    "label": ("label", "answer", "solution"),
    "response": ("response", "completion", "messages"),
    "steps": ("steps", "completions"),
}
HUB = "hf:"
STEP = "\n\n"  # a blank line ends a step (PURE, arXiv 2504.15275)
ANSWERS = ("response", "chosen", "rejected")  # each a text, or messages of which the last is the answer


class Rows(list[T]):
    """Rows in the order of their file, and where each of them stands: `places[i]` is "pairs.jsonl:10" for row i."""

    def __init__(self, rows: Iterable[T], places: Iterable[str]) -> None:
        super().__init__(rows)
        self.places = list(places)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Put `place` before the sentence of a ValueError that is raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def read_rows(path: str | Path, row: type[Row], *, check: Callable[[Row], None] | None = None) -> Rows[Row]:
    """All rows of a JSONL or .parquet file as `row` (Prompt, Example, Demonstration, Pair or Solution).

    "hf:OWNER/NAME/CONFIG:SPLIT" is a data set of the Hugging Face hub; /CONFIG may be left out, and so may :train.

    The fields have the names of COLUMNS; further ones are ignored. A prompt is a text or a list of messages
    {"role", "content"}; an answer is a text or a list of messages that ends with the assistant's, and what stands
    before that one is the prompt. Steps are a list of texts, or one text with a blank line between them, and have a
    label each: true or 1, false or 0. `check` raises ValueError for a row it refuses. Raises ValueError naming the file
    and the line for all that is malformed or refused, and for a file without rows; FileNotFoundError if it is missing.
    """
    lines: Iterable[Any]
    if str(path).startswith(HUB):
        lines = _read_hub(str(path))
    else:
        lines = _read_parquet(path) if str(path).endswith(".parquet") else _read_lines(path)
    rows, places = [], []
    for number, line in enumerate(lines, start=1):
        with at(f"{path}:{number}"):
            if isinstance(line, str) and line.isspace():
                continue
            parsed = _row(_parse(line) if isinstance(line, str) else line, row)
            if check is not None:
                check(parsed)
        rows.append(parsed)
        places.append(f"{path}:{number}")
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got an empty file")
    return Rows(rows, places)


def _read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text, without a byte order mark. A byte that is not UTF-8 becomes a lone surrogate."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        yield from lines


def _parse(line: str) -> object:
    if not line.isascii():
        _check_encoding(line)
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("expected one JSON object per line, got one nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"expected one JSON object per line, got {error}") from None


def _check_encoding(line: str) -> None:
    """Refuse a byte that was not UTF-8."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) & 0xFF
        raise ValueError(
            f"expected UTF-8 text, got the byte 0x{byte:02x}: files in UTF-16, in Latin-1 or compressed must be "
            "converted first"
        ) from None


def _read_parquet(path: str | Path) -> Iterator[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet files need the package pyarrow, pip install 'qrm_fast[parquet]'; JSONL needs nothing"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path}: expected a parquet file, got {error}") from None


def _read_hub(spec: str) -> Iterable[dict]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{spec}: data sets of the hub need the package datasets, pip install 'qrm_fast[hub]'; files need nothing"
        ) from None
    named = re.fullmatch(HUB + r"([^/:]+/[^/:]+)(?:/([^/:]+))?(?::(.+))?", spec)
    if named is None:
        raise ValueError(f"{spec}: a data set of the hub must be named hf:OWNER/NAME, or hf:OWNER/NAME/CONFIG:SPLIT")
    name, config, split = named.groups()
    try:
        return load_dataset(name, config, split=split or "train")
    except Exception as error:  # it raises errors of several packages for what is not there
        raise ValueError(f"{spec}: the hub has no such data set: {error}") from error


def _row(fields: object, row: type[Row]) -> Row:
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    values: dict[str, Any] = {}
    for name in row._fields:
        keys = [key for key in COLUMNS.get(name, (name,)) if fields.get(key) is not None]
        values[name] = fields[keys[0]] if keys else None
    before = []  # the messages before each answer that is given as messages
    for name in (name for name in ANSWERS if isinstance(values.get(name), list)):
        *prompt, answer = _messages(values[name], name)
        if answer.role != "assistant":
            raise ValueError(f"the last message of {name!r} must be the assistant's, got {answer.role!r}")
        values[name] = answer.content
        before.append(tuple(prompt))
    if isinstance(values["instruction"], list):
        values["instruction"] = tuple(_messages(values["instruction"], "instruction"))
    if any(before):
        values["instruction"] = _one_prompt(before, values["instruction"])
    if row is Judged:
        values["label"] = _label(fields.get("label"))
    if row is Solution:
        values["steps"], values["labels"] = _steps(values["steps"], values["labels"], fields)
    for name, value in values.items():
        read = name in ("steps", "labels") or (name == "label" and row is Judged)
        if read or (value is None and name in row._field_defaults):
            continue
        if isinstance(value, tuple):
            if value[-1].role == "assistant":
                raise ValueError("the last message of a prompt must not be the assistant's, whose turn comes next")
        elif not isinstance(value, str):
            names = " or ".join(map(repr, COLUMNS.get(name, (name,))))
            raise ValueError(f"expected a string field {names}, got {_kind(value, fields)}")
        else:
            check_text(value, name)
    return row(**values)


def _kind(value: object, fields: dict) -> str:
    return f"only {sorted(fields)}" if value is None else type(value).__name__


def _steps(steps: object, labels: object, fields: dict) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Steps and their labels, one for each."""
    if isinstance(steps, str):
        steps = steps.split(STEP)
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        names = " or ".join(map(repr, COLUMNS["steps"]))
        raise ValueError(f"expected steps, a text or a list of texts, in {names}, got {_kind(steps, fields)}")
    if not isinstance(labels, list):
        raise ValueError(f"expected a list of labels in 'labels', got {_kind(labels, fields)}")
    for number, step in enumerate(steps, start=1):
        check_text(step, f"step {number}")
    judged = [_label(label, f" for step {number}") for number, label in enumerate(labels, start=1)]
    if len(labels) != len(steps):
        raise ValueError(f"expected one label for each step, got {len(labels)} labels and {len(steps)} steps")
    return tuple(steps), tuple(judged)


def _label(label: object, where: str = "") -> bool:
    if not isinstance(label, int | float) or label not in (0, 1):
        raise ValueError(f"labels must be true or false, 1 or 0, got {label!r}{where}")
    return bool(label)


def _messages(value: list, name: str) -> list[Message]:
    if not value:
        raise ValueError(f"expected at least one message in {name!r}, got none")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise ValueError(f"expected messages with a role and a content in {name!r}, got {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"expected messages with a role of {', '.join(ROLES)} and a string content in {name!r}, got role "
                f"{role!r} and content {type(content).__name__}"
            )
        check_text(content, name)
        messages.append(Message(role, content))
    return messages


def _one_prompt(before: list[tuple[Message, ...]], instruction: Instruction | None) -> tuple[Message, ...]:
    """The messages before the answers, which must be the same before each, and the prompt if that is given too."""
    prompt = before[0]
    asked = prompt[-1].content if prompt else None
    if any(other != prompt for other in before) or instruction not in (None, prompt, asked):
        raise ValueError("expected the same prompt before every answer of a row, got different ones")
    return prompt


def check_text(text: str, name: str) -> None:
    """Raise ValueError for half a character, which JSON can hold and no tokenizer reads."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected text in {name!r}, got the lone surrogate {text[error.start]!a}") from None


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as `read_rows` reads them."""
    with open(path, "w", encoding="utf-8") as lines:
        for row in rows:
            fields = row._asdict()
            if not isinstance(row.instruction, str):
                fields["instruction"] = [message._asdict() for message in row.instruction]
            lines.write(json.dumps(fields, ensure_ascii=False) + "\n")


def texts(rows: Iterable[Row]) -> Iterator[str]:
    """Every text of the rows, to train a tokenizer on: one by one, the contents of messages among them."""
    for instruction, *rest in rows:
        yield from [instruction] if isinstance(instruction, str) else (message.content for message in instruction)
        for field in rest:
            fields = field if isinstance(field, tuple) else (field,)
            yield from (text for text in fields if isinstance(text, str))


def fit(prompt: list[int], response: list[int], max_len: int, name: str) -> list[int]:
    """Prompt and response in at most `max_len` tokens: the response is cut from the right, the prompt never.

    Raises ValueError naming the row where the prompt leaves no room for a response.
    """
    if len(prompt) >= max_len:
        raise ValueError(f"{name}: a prompt must leave room for a response in {max_len} tokens, got {len(prompt)}")
    return (prompt + response)[:max_len]


def fit_rows(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], max_len: int, places: Sequence[str]
) -> list[list[int]]:
    """`fit` for every row. A warning says how many responses were cut, and how long the longest was."""
    rows = zip(prompts, responses, places, strict=True)
    sequences = [fit(prompt, response, max_len, place) for prompt, response, place in rows]
    whole = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    cut = [i for i, num_tokens in enumerate(whole) if num_tokens > max_len]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(whole)} responses are cut to {max_len} tokens with their prompt, the first is "
            f"{places[cut[0]]}, the longest has {max(whole)}",
            stacklevel=2,
        )
    return sequences


class Sides(Protocol):
    """A pair of texts, or of their tokens."""

    @property
    def chosen(self) -> Sequence: ...
    @property
    def rejected(self) -> Sequence: ...


def unequal_pairs(pairs: Sequence[Sides], places: Sequence[str]) -> list[int]:
    """Indices of the pairs whose two sides differ, as given or as cut: two equal sides teach only that Q is noise.

    A warning says how many do not. Raises ValueError where none is left.
    """
    kept = [i for i, pair in enumerate(pairs) if pair.chosen != pair.rejected]
    if len(kept) < len(pairs):
        first = next(place for place, pair in zip(places, pairs, strict=True) if pair.chosen == pair.rejected)
        counts = f"{len(pairs) - len(kept)} of {len(pairs)} pairs have two equal sides within max_len tokens"
        if not kept:
            raise ValueError(f"{first}: expected pairs of different answers, but {counts}")
        warnings.warn(f"{counts} and are left out, the first is {first}", stacklevel=2)
    return kept
