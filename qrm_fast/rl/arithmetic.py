"""The embedded task: a running total of one-digit summands, a blank line between steps, then the answer."""

import zlib
from random import Random
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .data import STEP, Example

THINKING = "?"  # a step that says nothing, neither right nor wrong
ALPHABET = ["<pad>", "<eos>", *"0123456789+=#:", STEP, THINKING]
# How demonstrations go wrong: where 8 or 9 is added, a carry that is due is mostly forgotten; where 6 or 7 is, one too
# many is often counted. Slips of both signs must be common, or a reward model takes "the larger total wins" for the
# rule and a policy that learns from it makes totals up; and they must not cancel, or wrong steps give right answers.
FORGETFUL, FORGOTTEN_CARRY = (8, 9), 0.6
HASTY, ONE_TOO_MANY = (6, 7), 0.35

Split = Literal["train", "tuning", "report"]


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, one for the blank line between steps: 18 ids. Unknown characters raise."""
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


def arithmetic_demonstration(instruction: str, rng: Random | None = None, *, thinking: float = 0.0) -> str:
    """A worked answer, "07+6=13(blank line)13+1=14(blank line)14+9=23(blank line)#23"; with `rng`, some steps go wrong.

    A slip is carried on: the steps after it are computed from the wrong total. `thinking` is the probability of a step
    of "?" before each of the others, which needs `rng` too.
    """
    total, *summands = _summands(instruction)
    steps = []
    for digit in summands:
        result = total + digit
        if rng is not None:
            slip = rng.random()
            if digit in FORGETFUL and total % 10 + digit >= 10 and slip < FORGOTTEN_CARRY:
                result -= 10
            elif digit in HASTY and slip < ONE_TOO_MANY:
                result += 1
        steps.append(f"{total:02d}+{digit}={result:02d}")
        total = result
    steps.append(f"#{total:02d}")
    if rng is not None and thinking:
        steps = [part for step in steps for part in ([THINKING, step] if rng.random() < thinking else [step])]
    return STEP.join(steps)


def arithmetic_steps(instruction: str, response: str) -> list[bool]:
    """Whether each step of a response is right: the total so far, the next summand, their sum; then the answer.

    A step of "?" before the answer is not wrong.
    """
    total, *summands = _summands(instruction)
    right, i = [], 0
    for step in response.split(STEP):
        if step == THINKING and i <= len(summands):
            right.append(True)
            continue
        if i < len(summands):
            right.append(step == f"{total:02d}+{summands[i]}={total + summands[i]:02d}")
            written = step.rpartition("=")[2]
        else:
            right.append(i == len(summands) and step == f"#{total:02d}")
            written = ""
        # The next step is judged from the total that was written, not from the one that should have been.
        total = int(written) if written.isdecimal() else -1
        i += 1
    return right


def _summands(instruction: str) -> list[int]:
    return [int(digit) for digit in instruction.removesuffix(":").split("+")]


def arithmetic_is_right(response: str, label: str) -> bool:
    """The response ends with its answer line, "#23" for "23". Raises ValueError for a label of another form."""
    if not (label.isdecimal() and len(label) >= 2):
        raise ValueError(f'label must be a total of two digits for the verifier "arithmetic", got {label!r}')
    return response.rpartition(STEP)[2] == f"#{label}"
