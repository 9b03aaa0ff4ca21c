"""The whole method on two CPU cores in minutes: a policy that slips, preference pairs of its own answers, a Q-RM
trained on them, and reinforcement learning from that Q-RM alone.

The verifier labels the pairs and judges the evaluation; the Q-RM is all the policy learns from. Prompts for training
and for the report are disjoint; the settings below were chosen on a third set (`split="tuning"`).
"""

import time
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import NamedTuple

from .arithmetic import arithmetic_demonstration, arithmetic_examples
from .config import Config, preset
from .data import Demonstration, Example, Pair, write_jsonl
from .models import load_policy
from .policy import Policy
from .reward_training import QRMConfig, QRMResult, train_q_rm
from .rewards import answer_texts, verified
from .rollout import TransformersEngine
from .score import TokenScores, score
from .sft import SFTConfig, train_sft
from .tokenizers import encode_prompt, load_tokenizer
from .train import PassAt1, train

MAX_NEW_TOKENS = 60
NUM_RL_PROMPTS, NUM_REPORT_PROMPTS = 8192, 512

SFT = SFTConfig(
    data="",
    out="",
    overwrite=True,
    model="scratch:demo",
    tokenizer="arithmetic",
    num_steps=400,
    batch_size=64,
    lr=2e-3,
    warmup_steps=50,
    decay=0.4,
)
PAIR_PROMPTS, ANSWERS_PER_PROMPT, PAIRS_PER_PROMPT = 2400, 8, 3
Q_RM = QRMConfig(
    data="",
    out="",
    overwrite=True,
    beta=1.0,
    gamma=0.0,
    heldout=0.1,
    num_epochs=2,
    batch_size=64,
    lr=1e-3,
    max_tokens=6144,
)
RL = Config(
    model="",
    data="",
    out="",
    overwrite=True,
    **preset("qrm-paper"),
    verifier="arithmetic",
    num_iterations=24,
    num_prompts=128,
    group_size=4,
    max_new_tokens=MAX_NEW_TOKENS,
    lr=3e-5,
    max_tokens=6144,
    eval_every=8,
    eval_samples=4,
)


class Run(NamedTuple):
    reward: str  # Q-RM, or the control: verifier + RLOO, random reward, Q-RM on shuffled labels
    seed: int
    before: PassAt1
    after: PassAt1
    metrics: list[dict[str, float]]


class DemoResult(NamedTuple):
    directory: str
    runs: list[Run]
    q_rms: list[QRMResult]  # one per seed
    prompt: str
    right: TokenScores  # Q of a right and of a wrong answer to that prompt
    wrong: TokenScores


def demo(seeds: int = 1, controls: bool = False, out: str = "runs/demo") -> DemoResult:
    """Train everything for seeds 0, 1, ..., print what was measured, and return it.

    `controls` adds, from the same starting policy and with the same settings: the verifier with RLOO, a random reward,
    and a Q-RM whose preference labels were shuffled. Everything is written under `out`: data, checkpoints that plain
    transformers loads, and one metrics.jsonl per training.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    runs: list[Run] = []
    q_rms: list[QRMResult] = []
    for seed in range(seeds):
        start = time.perf_counter()
        folder = Path(out) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"seed {seed}: everything is written to {folder}")

        examples = arithmetic_examples(SFT.num_steps * SFT.batch_size, split="train", seed=10 * seed)
        slips = Random(seed)
        rows = [Demonstration(e.instruction, arithmetic_demonstration(str(e.instruction), slips)) for e in examples]
        write_jsonl(folder / "demonstrations.jsonl", rows)
        write_jsonl(folder / "prompts.jsonl", arithmetic_examples(NUM_RL_PROMPTS, split="train", seed=10 * seed + 1))
        write_jsonl(folder / "report.jsonl", arithmetic_examples(NUM_REPORT_PROMPTS, split="report", seed=seed))

        sft = train_sft(replace(SFT, data=f"{folder}/demonstrations.jsonl", out=f"{folder}/sft", seed=seed))
        print(f"  sft      loss {sft.loss:.4f} per token, {sft.tokens_per_s:,.0f} tokens/s")

        examples = arithmetic_examples(PAIR_PROMPTS, split="train", seed=10 * seed + 2)
        pairs, tokens_per_s = sample_pairs(sft.directory, examples, seed)
        write_jsonl(folder / "pairs.jsonl", pairs)
        print(f"  pairs    {len(pairs)} of right and wrong answers, {tokens_per_s:,.0f} tokens/s")

        settings = replace(Q_RM, model=sft.directory, seed=seed)
        q_rm = train_q_rm(replace(settings, data=f"{folder}/pairs.jsonl", out=f"{folder}/q_rm"))
        q_rms.append(q_rm)
        assert q_rm.heldout is not None  # Q_RM holds a share out
        print(
            f"  q-rm     pair accuracy {q_rm.heldout.accuracy:.3f} held out, {q_rm.train.accuracy:.3f} in training; "
            f"at the first differing token {q_rm.heldout.action_accuracy:.3f}; {q_rm.tokens_per_s:,.0f} tokens/s"
        )

        rl = replace(RL, model=sft.directory, data=f"{folder}/prompts.jsonl", seed=seed)
        rl = replace(rl, eval_data=f"{folder}/report.jsonl", q_rm=q_rm.directory)
        runs.append(run("Q-RM", replace(rl, out=f"{folder}/policy")))
        if controls:
            coin = Random(seed)
            shuffled = [Pair(p.instruction, *coin.sample([p.chosen, p.rejected], 2)) for p in pairs]
            write_jsonl(folder / "shuffled.jsonl", shuffled)
            bad = train_q_rm(replace(settings, data=f"{folder}/shuffled.jsonl", out=f"{folder}/q_rm_shuffled"))
            runs.append(run("verifier, RLOO", replace(rl, **preset("rloo"), out=f"{folder}/verifier")))
            runs.append(run("random", replace(rl, reward="random", out=f"{folder}/random")))
            runs.append(run("Q-RM, shuffled", replace(rl, q_rm=bad.directory, out=f"{folder}/shuffled")))
        print(f"  seed {seed} took {time.perf_counter() - start:.0f} s")
    print_table(runs)
    examples = arithmetic_examples(NUM_REPORT_PROMPTS, split="report", seed=0)
    pair = sample_pairs(f"{out}/seed0/sft", examples[:32], seed=0)[0][0]
    prompt = str(pair.instruction)
    right, wrong = score(f"{out}/seed0/q_rm", prompt, [pair.chosen, pair.rejected])
    return DemoResult(out, runs, q_rms, prompt, right, wrong)


def sample_pairs(directory: str, examples: list[Example], seed: int) -> tuple[list[Pair], float]:
    """Right against wrong answers that the policy gave to the same prompt, and the tokens per second of sampling."""
    tokenizer = load_tokenizer(directory)
    engine = TransformersEngine(Policy(load_policy(directory, tokenizer)), [tokenizer.eos_token_id])
    start = time.perf_counter()
    rollout = engine.generate(
        [encode_prompt(tokenizer, example.instruction) for example in examples],
        num_samples=ANSWERS_PER_PROMPT,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        seed=seed,
    )
    seconds = time.perf_counter() - start
    asked = [example for example in examples for _ in range(ANSWERS_PER_PROMPT)]
    labels = [example.label for example in asked]
    is_right = verified("arithmetic", tokenizer, rollout.responses, rollout.finished, labels).bool().tolist()
    texts = answer_texts(tokenizer, rollout.responses, rollout.finished)
    answers: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # prompt: its different wrong and right ones
    for example, text, finished, right in zip(asked, texts, rollout.finished, is_right, strict=True):
        if finished:
            answers.setdefault(str(example.instruction), ({}, {}))[right][text] = None
    pairs = []
    for instruction, (wrong, right) in answers.items():
        chosen = next(iter(right), None)
        if chosen is not None:
            pairs += [Pair(instruction, chosen, rejected) for rejected in list(wrong)[:PAIRS_PER_PROMPT]]
    return pairs, sum(map(len, rollout.responses)) / seconds


def run(reward: str, config: Config) -> Run:
    result = train(config)
    before, after = result.before, result.after
    assert before is not None and after is not None  # there is eval_data
    names = ("rollout", "credit", "update")
    speeds = (mean(row.get(f"perf/{name}_tokens_per_s", 0) for row in result.metrics[1:]) for name in names)
    print(
        f"  {reward:15} sampled Pass@1 {before.sampled:.3f} -> {after.sampled:.3f}, greedy {before.greedy:.3f} -> "
        f"{after.greedy:.3f}; tokens/s: {', '.join(f'{n} {x:,.0f}' for n, x in zip(names, speeds, strict=True))}"
    )
    return Run(reward, config.seed, before, after, result.metrics)


def print_table(runs: list[Run]) -> None:
    """Pass@1 before and after per reward, means over the seeds, with the gain in sampled Pass@1 of each seed."""
    print(f"\n{'reward':16}{'sampled Pass@1':^18}{'greedy Pass@1':^18}{'gain, sampled':^15}by seed")
    for reward in dict.fromkeys(run.reward for run in runs):
        before, after = zip(*((run.before, run.after) for run in runs if run.reward == reward), strict=True)
        gains = [b.sampled - a.sampled for a, b in zip(before, after, strict=True)]
        sampled, greedy = (
            f"{mean(getattr(x, name) for x in before):.3f} -> {mean(getattr(x, name) for x in after):.3f}"
            for name in ("sampled", "greedy")
        )
        print(f"{reward:16}{sampled:^18}{greedy:^18}{mean(gains):^+15.3f}{' '.join(f'{g:+.3f}' for g in gains)}")
