"""The embedded task: a running total of one-digit summands, a blank line between steps, then the answer."""

import zlib
from random import Random
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .data import STEP, Example

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


def arithmetic_is_right(response: str, label: str) -> bool:
    """The response ends with its answer line, "#23" for "23". Raises ValueError for a label of another form."""
    if not (label.isdecimal() and len(label) >= 2):
        raise ValueError(f'label must be a total of two digits for the verifier "arithmetic", got {label!r}')
    return response.rpartition(STEP)[2] == f"#{label}"
