"""Tokens per second of every kind of `train-rm` on the same texts at one token budget: `python -m bench.reward_models`.

A model of 4 layers and 4096 tokens (scratch:small), answers of 20 to 400 tokens to prompts of 40 to 100. Kinds take
turns; the first step of each turn is left out. A head's time is that of its own forward and backward pass on the
actions of a step. DPO and implicit reward models also pay for a pass of the reference over all texts, once, before
their first step: it is reported apart.
"""

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qrm_fast import linear_logprobs, token_q
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.data import Judged, Pair, Solution, write_jsonl
from qrm_fast.rl.implicit_training import DPOConfig, ImplicitConfig, train_implicit
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.prm_training import PRMConfig, train_prm
from qrm_fast.rl.reward_training import ORMConfig, QRMConfig, read_pairs, train_q_rm
from qrm_fast.rl.token_rows import pack_rows
from qrm_fast.rl.tokenizers import load_tokenizer

from .provenance import provenance

VOCABULARY, STEPS, TURNS, PAIRS = 4096, 5, 3, 16


def write_texts(folder: Path) -> None:
    """As many pairs as the steps of a turn take, and the same answers judged as wholes and step by step."""
    rng = Random(0)

    def words(num: int) -> list[str]:
        return [f"w{rng.randrange(3, VOCABULARY)}" for _ in range(num)]

    pairs = []
    for _ in range(PAIRS * STEPS):
        prompt, *answers = (
            words(rng.randint(40, 100)),
            *(words(min(max(int(rng.lognormvariate(math.log(160), 0.7)), 20), 400)) for _ in "wl"),
        )
        pairs.append((" ".join(prompt), answers))
    write_jsonl(folder / "pairs.jsonl", [Pair(p, *map(" ".join, answers)) for p, answers in pairs])
    rows = [(p, answer, side) for p, answers in pairs for side, answer in enumerate(answers)]
    write_jsonl(folder / "judged.jsonl", [Judged(p, " ".join(answer), not side) for p, answer, side in rows])
    solutions = []
    for p, answer, side in rows:  # the separators stand in the place of words, the last one in that of EOS
        steps = [answer[i : i + 31] for i in range(0, len(answer), 32)]
        solutions.append(Solution(p, tuple(map(" ".join, steps)), (not side,) * len(steps)))
    write_jsonl(folder / "solutions.jsonl", solutions)


def write_policy(folder: Path) -> None:
    torch.manual_seed(0)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
    save_checkpoint(load_policy("scratch:small", tokenizer), tokenizer, folder)


def trainings(folder: Path) -> dict[str, Callable[[], Any]]:
    common: dict[str, Any] = dict(model=str(folder / "policy"), overwrite=True, heldout=0.0, lr=1e-4)

    def options(kind: str, data: str, rows: int) -> dict[str, Any]:
        return dict(data=str(folder / f"{data}.jsonl"), out=str(folder / kind), batch_size=rows, **common)

    of_pairs = {"qrm": QRMConfig, "qrm-vocab": partial(QRMConfig, kind="qrm-vocab"), "orm": ORMConfig}
    solutions = PRMConfig(**options("prm", "solutions", 2 * PAIRS), separator="w2", num_head_epochs=0)
    return {
        **{kind: partial(train_q_rm, config(**options(kind, "pairs", PAIRS))) for kind, config in of_pairs.items()},
        "prm": partial(train_prm, solutions),
        "dpo": partial(train_implicit, DPOConfig(**options("dpo", "pairs", PAIRS))),
        "implicit": partial(train_implicit, ImplicitConfig(**options("implicit", "judged", 2 * PAIRS))),
    }


def seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(5):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return median(times)


def head_seconds(num_actions: int, width: int) -> dict[str, float]:
    """Forward and backward pass of each head on the actions of a step."""
    hidden = torch.randn(num_actions, width, requires_grad=True)
    weight = torch.randn(VOCABULARY, width).div_(16).requires_grad_()
    targets = torch.randint(VOCABULARY, (num_actions,))
    scalar = seconds(lambda: token_q(hidden, weight[:1]).sum().backward())
    gathered = seconds(lambda: token_q(hidden, weight, targets).sum().backward())
    softmax = seconds(lambda: linear_logprobs(hidden, weight, targets).logprobs.sum().backward())
    return {"qrm": scalar, "orm": scalar, "prm": 0.0, "qrm-vocab": gathered, "dpo": softmax, "implicit": softmax}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder)
        write_policy(folder / "policy")
        step_seconds, num_tokens = defaultdict(list), {}
        for _ in range(TURNS):
            for kind, train in trainings(folder).items():
                train()
                lines = (folder / kind / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                rows = [row for row in map(json.loads, lines) if "time/update_s" in row]
                tokens = [row["time/update_s"] * row["perf/update_tokens_per_s"] for row in rows]
                num_tokens[kind] = sum(tokens)
                step_seconds[kind] += [(t, row["time/update_s"]) for t, row in zip(tokens[1:], rows[1:], strict=True)]
        policy = Policy(load_policy(str(folder / "policy"), load_tokenizer(str(folder / "policy"))))
        _, _, pairs = read_pairs(DPOConfig(data=str(folder / "pairs.jsonl"), model=str(folder / "policy"), out=""))
        batch = pack_rows(pairs[:PAIRS], "cpu")
        with torch.no_grad():
            reference = len(batch.input_ids) / seconds(lambda: policy(batch))
        heads = head_seconds(len(batch.action_index), policy.head().weight.shape[1])

    made = provenance("cpu")
    print(
        f"{len(batch.input_ids)} tokens a step of which {len(batch.action_index)} actions, {made['hardware']}, {made}"
    )
    print("| kind | tokens/s | of qrm's | head, ms a step | tokens/s without the head | of qrm's |")
    print("|---|---|---|---|---|---|")
    table = {}
    for kind, steps in step_seconds.items():
        table[kind] = [
            median(t / (s - without * t / len(batch.input_ids)) for t, s in steps) for without in (0, heads[kind])
        ]
    for kind, (speed, bare) in table.items():
        of = speed / table["qrm"][0], bare / table["qrm"][1]
        print(f"| {kind} | {speed:,.0f} | {of[0]:.2f} | {heads[kind] * 1e3:.1f} | {bare:,.0f} | {of[1]:.2f} |")
    print(f"the reference: {reference:,.0f} tokens/s, {num_tokens['dpo']:,.0f} tokens of a whole training once")


if __name__ == "__main__":
    main()
