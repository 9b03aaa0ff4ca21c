"""What is learned and how it is checked: the embedded arithmetic task, JSONL readers, tokens of a prompt, verifiers."""

import json
import re
import zlib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple, TypeVar

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """Token ids of a prompt: through the tokenizer's chat template where it has one, else the plain text.

    Raises ValueError for a prompt without tokens, which nothing could be predicted from.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer(instruction).input_ids
        if not ids:
            raise ValueError(f"a prompt must have at least one token, got none for the instruction {instruction!r}")
        return ids
    turn = [{"role": "user", "content": instruction}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response, tokenised on its own and ended by EOS, which is an action like any other."""
    return [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def fit(prompt: list[int], response: list[int], max_len: int, name: str) -> list[int]:
    """Prompt and response in at most `max_len` tokens: the response is cut from the right, the prompt never.

    Raises ValueError naming the row where the prompt leaves no room for a response.
    """
    if len(prompt) >= max_len:
        raise ValueError(f"{name}: a prompt must leave room for a response in {max_len} tokens, got {len(prompt)}")
    return (prompt + response)[:max_len]


# ---- arithmetic: a running total of one-digit summands, a blank line between steps, then the answer

STEP = "\n\n"
ALPHABET = ["<pad>", "<eos>", *"0123456789+=#:", STEP]
# How demonstrations go wrong: a carry that is due is forgotten where a large digit is added, and one that is not due is
# made where a small digit is added. Both must be common: a reward model that has seen few totals too large takes "the
# larger total wins" for the rule, and a policy that learns from it makes carries up.
LARGE_DIGIT, FORGOTTEN_CARRY = 7, 0.4
SMALL_DIGIT, SPURIOUS_CARRY = 3, 0.2

Split = Literal["train", "tuning", "report"]


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, one for the blank line between steps: 17 ids. Unknown characters raise."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def arithmetic_examples(num: int, *, split: Split, seed: int) -> list[Example]:
    """`num` different problems such as ("7+6+1+9:", "23"): 4 to 6 summands of 1 to 9.

    A hash of the prompt decides its split, so that train, tuning and report share no problem whatever the seeds.
    """
    rng = Random(seed)
    labels: dict[str, str] = {}
    while len(labels) < num:
        summands = [rng.randint(1, 9) for _ in range(rng.randint(4, 6))]
        prompt = "+".join(map(str, summands)) + ":"
        if arithmetic_split(prompt) == split:
            labels[prompt] = f"{sum(summands):02d}"
    return [Example(*item) for item in labels.items()]


def arithmetic_split(prompt: str) -> Split:
    bucket = zlib.crc32(prompt.encode()) % 16
    return "report" if bucket == 0 else "tuning" if bucket == 1 else "train"


def arithmetic_demonstration(instruction: str, rng: Random | None = None) -> str:
    """A worked answer, "07+6=13(blank line)13+1=14(blank line)14+9=23(blank line)#23"; with `rng`, carries go wrong.

    A slip is carried on: the steps after it are computed from the wrong total.
    """
    total, *summands = _summands(instruction)
    steps = []
    for digit in summands:
        result = total + digit
        if rng is not None:
            due = total % 10 + digit >= 10
            if due:
                slip = FORGOTTEN_CARRY if digit >= LARGE_DIGIT else 0.0
            else:
                slip = SPURIOUS_CARRY if digit <= SMALL_DIGIT else 0.0
            if rng.random() < slip:
                result += -10 if due else 10
        steps.append(f"{total:02d}+{digit}={result:02d}")
        total = result
    return STEP.join([*steps, f"#{total:02d}"])


def arithmetic_steps(instruction: str, response: str) -> list[bool]:
    """Whether each step of a response is right: the total so far, the next summand, their sum; then the answer."""
    total, *summands = _summands(instruction)
    right = []
    for i, step in enumerate(response.split(STEP)):
        if i < len(summands):
            right.append(step == f"{total:02d}+{summands[i]}={total + summands[i]:02d}")
            written = step.rpartition("=")[2]
        else:
            right.append(i == len(summands) and step == f"#{total:02d}")
            written = ""
        # The next step is judged from the total that was written, not from the one that should have been.
        total = int(written) if written.isdecimal() else -1
    return right


def _summands(instruction: str) -> list[int]:
    return [int(digit) for digit in instruction.removesuffix(":").split("+")]


# ---- verifiers: (response, label) -> whether the answer is right

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


def arithmetic_is_right(response: str, label: str) -> bool:
    """The response ends with its answer line, "#23" for "23"."""
    return response.rpartition(STEP)[2] == f"#{label}"


VERIFIERS: dict[str, Callable[[str, str], bool]] = {"arithmetic": arithmetic_is_right, "number": number_is_right}


def find_verifier(name: str) -> Callable[[str, str], bool]:
    """The verifier of this name in VERIFIERS. Raises ValueError for an unknown one."""
    if name not in VERIFIERS:
        raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {name}")
    return VERIFIERS[name]
