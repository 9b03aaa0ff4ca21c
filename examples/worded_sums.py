"""Worded sums, and preference pairs of a model's own answers to them: the task of docs/real-model.md.

    python examples/worded_sums.py --model MODEL --out runs/sums

Writes prompts.jsonl and heldout.jsonl, which share no sum, and pairs.jsonl: right against wrong answers that MODEL
sampled to the first prompts, as the verifier "number" judges them.
"""

import argparse
from itertools import product
from pathlib import Path
from random import Random

import torch

from qrm_fast.rl.data import Example, Message, Pair, write_jsonl
from qrm_fast.rl.models import load_policy, num_token_ids
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rewards import answer_texts, verified
from qrm_fast.rl.rollout import TransformersEngine
from qrm_fast.rl.tokenizers import encode_prompt, load_tokenizer, stop_ids

# One example in the prompt: without it a small instruct model talks on, and there is little to tell right from wrong.
SHOT = (
    Message("system", "Write one equation."),
    Message("user", "Sam has 5 cups and buys 2 more. How many?"),
    Message("assistant", "Sam has 5 + 2 = 7 cups."),
)
NAMES = ("Tom", "Anna", "Ben", "Mia", "Leo", "Eva", "Max", "Ida")
THINGS = ("apples", "pens", "eggs", "coins", "books", "stamps", "shells", "cards")
NUM_PROMPTS, NUM_HELDOUT = 512, 64
NUM_SAMPLED, ANSWERS_PER_PROMPT, PAIRS_PER_PROMPT = 192, 4, 2


def examples(seed: int) -> tuple[list[Example], list[Example]]:
    """Prompts to train on and held-out ones: no sum of the one is a sum of the other."""
    random = Random(seed)
    sums = [(a, b, True) for a, b in product(range(2, 10), repeat=2)]
    sums += [(a, b, False) for a, b, _ in sums if b < a]
    random.shuffle(sums)
    kept = len(sums) // 4

    def draw(among: list[tuple[int, int, bool]]) -> Example:
        (a, b, more), name, things = random.choice(among), random.choice(NAMES), random.choice(THINGS)
        change = f"buys {b} more" if more else f"loses {b}"
        question = Message("user", f"{name} has {a} {things} and {change}. How many?")
        return Example((*SHOT, question), str(a + b if more else a - b))

    return [draw(sums[kept:]) for _ in range(NUM_PROMPTS)], [draw(sums[:kept]) for _ in range(NUM_HELDOUT)]


def sample_pairs(
    model: str, asked: list[Example], max_new_tokens: int, dtype: str, seed: int
) -> tuple[list[Pair], float]:
    """Right against wrong answers to the same prompt, and the share of all answers that are right."""
    tokenizer = load_tokenizer(model)
    policy = Policy(load_policy(model, tokenizer, dtype=getattr(torch, dtype)), num_ids=num_token_ids(tokenizer))
    engine = TransformersEngine(policy, stop_ids(tokenizer, policy.model.generation_config))
    prompts = [encode_prompt(tokenizer, example.instruction) for example in asked]
    sampling = dict(num_samples=ANSWERS_PER_PROMPT, max_new_tokens=max_new_tokens, temperature=1.0, seed=seed)
    responses, _, finished = engine.generate(prompts, **sampling)
    of_answers = [example for example in asked for _ in range(ANSWERS_PER_PROMPT)]
    right = (
        verified("number", tokenizer, responses, finished, [example.label for example in of_answers]).bool().tolist()
    )
    answers: dict[Example, tuple[set[str], set[str]]] = {}  # the different wrong and right ones to each prompt
    texts = answer_texts(tokenizer, responses, finished)
    for example, text, is_right, done in zip(of_answers, texts, right, finished, strict=True):
        if done and text.strip():
            answers.setdefault(example, (set(), set()))[is_right].add(text)
    pairs = [
        Pair(example.instruction, chosen, rejected)
        for example, (bad, good) in answers.items()
        for chosen in sorted(good)[:1]
        for rejected in sorted(bad)[:PAIRS_PER_PROMPT]
    ]
    return pairs, sum(right) / len(right)


def write(model: str, out: str, max_new_tokens: int = 24, dtype: str = "bfloat16", seed: int = 0) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    prompts, heldout = examples(seed)
    write_jsonl(folder / "prompts.jsonl", prompts)
    write_jsonl(folder / "heldout.jsonl", heldout)
    pairs, share = sample_pairs(model, prompts[:NUM_SAMPLED], max_new_tokens, dtype, seed)
    write_jsonl(folder / "pairs.jsonl", pairs)
    print(f"{share:.3f} of {NUM_SAMPLED * ANSWERS_PER_PROMPT} sampled answers are right; {len(pairs)} pairs in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "out"):
        parser.add_argument(f"--{name}", required=True)
    write(**vars(parser.parse_args()))
