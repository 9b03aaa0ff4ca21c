"""Both methods on two CPU cores in minutes: a policy that slips, and reinforcement learning that mends it.

`demo` trains a Q-RM on preference pairs of the policy's own answers, and the policy from that Q-RM alone; a random
reward is the control. `process_demo` trains the policy on the step rewards of an imperfect PRM, by their sum and by
PURE's soft minimum. A verifier labels the pairs and judges the evaluation. Prompts for training and for the report
are disjoint; the settings below were chosen on a third set (`split="tuning"`).
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import NamedTuple

from .arithmetic import arithmetic_demonstration, arithmetic_examples
from .choices import TokenAdvantages, choice_advantages
from .config import Config, preset
from .data import Demonstration, Example, Pair, write_jsonl
from .models import load_policy
from .policy import Policy
from .reward_training import QRMConfig, QRMResult, train_q_rm
from .rewards import answer_texts, verified
from .rollout import TransformersEngine
from .sft import SFTConfig, train_sft
from .tokenizers import encode_prompt, load_tokenizer
from .train import PassAt1, train

MAX_NEW_TOKENS = 60
NUM_RL_PROMPTS, NUM_REPORT_PROMPTS, NUM_LOCATED_PROMPTS = 8192, 1024, 512

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
    num_epochs=3,
    batch_size=64,
    lr=1e-3,
    warmup_steps=10,
    decay=0.6,
    max_tokens=6144,
)
RL = Config(
    model="",
    data="",
    out="",
    overwrite=True,
    **preset("qrm-paper"),
    scope="group",  # the offset that Q has for a prompt would be noise
    verifier="arithmetic",
    num_iterations=24,
    num_prompts=128,
    group_size=4,
    max_new_tokens=MAX_NEW_TOKENS,
    lr=3e-5,
    max_tokens=6144,
    eval_every=8,
    eval_samples=2,
)


PROCESS_RL = replace(
    RL,
    **preset("pure-paper") | dict(prm="arithmetic:noise=0.3", kl_coef=0.0, lr=1e-4, max_new_tokens=72),
)
FORMS = {"min-form": replace(PROCESS_RL, operator="soft"), "sum-form": replace(PROCESS_RL, operator="sum")}
THINKING, EMPTY = 0.1, 0.01  # of the demonstrations: steps of "?" before others, and answers without a text


class Run(NamedTuple):
    reward: str  # Q-RM, a form of step rewards, or a control: random reward, verifier + RLOO, Q-RM on shuffled labels
    seed: int
    before: PassAt1
    after: PassAt1
    metrics: list[dict[str, float]]


class Located(NamedTuple):
    """Where a Q-RM sees wrong answers go wrong, and a typical one of them."""

    share: float  # of the wrong answers with several choices, those whose lowest advantage is at the first wrong token
    chance: float  # the same of one of the tokens at random where the policy had a choice
    num_answers: int  # with several choices
    prompt: str
    right: TokenAdvantages  # of the worked answer to that prompt
    wrong: TokenAdvantages


class DemoResult(NamedTuple):
    directory: str
    runs: list[Run]
    q_rms: list[QRMResult]  # one per seed; none in `process_demo`
    located: Located | None  # by the Q-RM of seed 0; None of `process_demo`
    summary: str  # what was trained, what it gained, what to run next


def demo(seeds: int = 1, controls: bool = False, out: str = "runs/demo") -> DemoResult:
    """Train everything for seeds 0, 1, ..., print what was measured, and return it.

    `controls` adds, from the same starting policy and with the same settings: the verifier with RLOO, and a Q-RM whose
    preference labels were shuffled. Everything is written under `out`: data, checkpoints that plain transformers loads,
    and one metrics.jsonl per training.
    """
    runs: list[Run] = []
    q_rms: list[QRMResult] = []
    for seed, folder in seed_folders(seeds, out):
        start = time.perf_counter()
        sft = train_start(folder, seed)
        examples = arithmetic_examples(PAIR_PROMPTS, split="train", seed=10 * seed + 2)
        pairs, tokens_per_s = sample_pairs(sft, examples, seed)
        write_jsonl(folder / "pairs.jsonl", pairs)
        print(f"  pairs    {len(pairs)} of right and wrong answers, {tokens_per_s:,.0f} tokens/s")

        settings = replace(Q_RM, model=sft, seed=seed)
        q_rm = train_q_rm(replace(settings, data=f"{folder}/pairs.jsonl", out=f"{folder}/q_rm"))
        q_rms.append(q_rm)
        assert q_rm.heldout is not None  # Q_RM holds a share out
        print(
            f"  q-rm     pair accuracy {q_rm.heldout.accuracy:.3f} held out, {q_rm.train.accuracy:.3f} in training; "
            f"at the first differing token {q_rm.heldout.action_accuracy:.3f}; {q_rm.tokens_per_s:,.0f} tokens/s"
        )

        rl = start_from(folder, RL, seed)
        rl = replace(rl, q_rm=q_rm.directory)
        runs.append(run("Q-RM", replace(rl, out=f"{folder}/policy")))
        runs.append(run("random reward", replace(rl, reward="random", out=f"{folder}/random")))
        if controls:
            coin = Random(seed)
            shuffled = [Pair(p.instruction, *coin.sample([p.chosen, p.rejected], 2)) for p in pairs]
            write_jsonl(folder / "shuffled.jsonl", shuffled)
            bad = train_q_rm(replace(settings, data=f"{folder}/shuffled.jsonl", out=f"{folder}/q_rm_shuffled"))
            runs.append(run("verifier, RLOO", replace(rl, **preset("rloo"), out=f"{folder}/verifier")))
            runs.append(run("Q-RM, shuffled", replace(rl, q_rm=bad.directory, out=f"{folder}/shuffled")))
        print(f"  seed {seed} took {time.perf_counter() - start:.0f} s")
    print_table(runs)
    located = locate(f"{out}/seed0/sft", f"{out}/seed0/q_rm")
    print(
        f"\nOf {located.num_answers} wrong answers with several choices on the way, {located.share:.3f} have the "
        f"lowest advantage at the\nfirst wrong token; a choice at random is that token in {located.chance:.3f}."
    )
    gain, control = (gains(runs, reward) for reward in ("Q-RM", "random reward"))
    summary = (
        f"\ntrained   a policy, by REINFORCE on the token scores of a Q-RM that saw {q_rms[0].num_train} preference "
        f"pairs and no step label"
        f"\ngained    {gain.sampled:+.3f} sampled and {gain.greedy:+.3f} greedy Pass@1 on problems it never saw; by a "
        f"random reward {control.sampled:+.3f} and {control.greedy:+.3f}"
        f"\nnext      qrm-fast demo --method pure; on data of your own, qrm-fast train-rm --help"
    )
    return DemoResult(out, runs, q_rms, located, summary)


def process_demo(seeds: int = 1, out: str = "runs/demo_pure") -> DemoResult:
    """The same for PURE: sum-form against min-form, from the same start, by the same imperfect PRM.

    Some demonstrations have steps of "?", which say nothing and are not wrong: the PRM rewards them as right steps.
    """
    runs: list[Run] = []
    for seed, folder in seed_folders(seeds, out):
        start = time.perf_counter()
        train_start(folder, seed, thinking=THINKING, empty=EMPTY)
        for name, form in FORMS.items():
            runs.append(run(name, replace(start_from(folder, form, seed), out=f"{folder}/{name}")))
            first, last = runs[-1].metrics[1], runs[-1].metrics[-1]
            print(
                f"{'':18}steps per answer {first['process/num_steps']:.1f} -> {last['process/num_steps']:.1f}, "
                f"reward of a step {first['reward/step_mean']:+.2f} -> {last['reward/step_mean']:+.2f}"
            )
        print(f"  seed {seed} took {time.perf_counter() - start:.0f} s")
    print_table(runs)
    low, total = (gains(runs, reward) for reward in ("min-form", "sum-form"))
    summary = (
        f"\ntrained   a policy twice on step rewards of a PRM that errs: by their soft minimum (PURE) and by their sum"
        f"\ngained    {low.sampled:+.3f} sampled and {low.greedy:+.3f} greedy Pass@1 on problems it never saw, by the "
        f"minimum; by the sum {total.sampled:+.3f} and {total.greedy:+.3f}"
        f"\nnext      qrm-fast lab --experiment sum-vs-min; on data of your own, qrm-fast train-rm --kind prm --help"
    )
    return DemoResult(out, runs, [], None, summary)


def seed_folders(seeds: int, out: str) -> Iterator[tuple[int, Path]]:
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    for seed in range(seeds):
        folder = Path(out) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"seed {seed}: everything is written to {folder}")
        yield seed, folder


def train_start(folder: Path, seed: int, *, thinking: float = 0.0, empty: float = 0.0) -> str:
    """Write the prompts of every phase, fine-tune a policy on demonstrations that slip, and return its checkpoint."""
    examples = arithmetic_examples(SFT.num_steps * SFT.batch_size, split="train", seed=10 * seed)
    slips = Random(seed)
    rows = [
        Demonstration(prompt, arithmetic_demonstration(str(prompt), slips, thinking=thinking)) for prompt, _ in examples
    ]
    rows = [row._replace(response="") if slips.random() < empty else row for row in rows]
    write_jsonl(folder / "demonstrations.jsonl", rows)
    write_jsonl(folder / "prompts.jsonl", arithmetic_examples(NUM_RL_PROMPTS, split="train", seed=10 * seed + 1))
    write_jsonl(folder / "report.jsonl", arithmetic_examples(NUM_REPORT_PROMPTS, split="report", seed=seed))
    sft = train_sft(replace(SFT, data=f"{folder}/demonstrations.jsonl", out=f"{folder}/sft", seed=seed))
    print(f"  sft      loss {sft.loss:.4f} per token, {sft.tokens_per_s:,.0f} tokens/s")
    return sft.directory


def start_from(folder: Path, config: Config, seed: int) -> Config:
    """`config` with the policy and the prompts that `train_start` wrote."""
    config = replace(config, model=f"{folder}/sft", data=f"{folder}/prompts.jsonl", seed=seed)
    return replace(config, eval_data=f"{folder}/report.jsonl")


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
        if finished and text:  # reward models refuse an empty side
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
    rows = [
        [row[f"perf/{name}_tokens_per_s"] for row in result.metrics[1:] if f"perf/{name}_tokens_per_s" in row]
        for name in names
    ]
    speeds = ", ".join(f"{name} {mean(row):,.0f}" for name, row in zip(names, rows, strict=True) if row)
    print(
        f"  {reward:15} sampled Pass@1 {before.sampled:.3f} -> {after.sampled:.3f}, greedy {before.greedy:.3f} -> "
        f"{after.greedy:.3f}; tokens/s: {speeds}"
    )
    return Run(reward, config.seed, before, after, result.metrics)


def means(runs: list[Run], reward: str) -> tuple[PassAt1, PassAt1]:
    """Pass@1 before and after, over the seeds."""
    chosen = [run for run in runs if run.reward == reward]
    before, after = zip(*(run.before for run in chosen), strict=True), zip(*(run.after for run in chosen), strict=True)
    return PassAt1(*map(mean, before)), PassAt1(*map(mean, after))


def gains(runs: list[Run], reward: str) -> PassAt1:
    """In Pass@1, means over the seeds."""
    before, after = means(runs, reward)
    return PassAt1(after.greedy - before.greedy, after.sampled - before.sampled)


def print_table(runs: list[Run]) -> None:
    """Pass@1 before and after per reward, means over the seeds, with the gain in sampled Pass@1 of each seed."""
    num_problems = NUM_REPORT_PROMPTS * len({run.seed for run in runs})
    print(f"\n{'reward':16}{'sampled Pass@1':^26}{'greedy Pass@1':^18}{'gain, sampled':^15}by seed")
    for reward in dict.fromkeys(run.reward for run in runs):
        before, after = means(runs, reward)
        error = (after.sampled * (1 - after.sampled) / num_problems) ** 0.5
        sampled = f"{before.sampled:.3f} -> {after.sampled:.3f} ± {error:.3f}"
        greedy = f"{before.greedy:.3f} -> {after.greedy:.3f}"
        each = [run.after.sampled - run.before.sampled for run in runs if run.reward == reward]
        print(f"{reward:16}{sampled:^26}{greedy:^18}{mean(each):^+15.3f}{' '.join(f'{g:+.3f}' for g in each)}")


def locate(policy: str, q_rm: str) -> Located:
    """Where the Q-RM sees the policy's wrong answers to report problems go wrong.

    The typical one is that whose advantage at the first wrong token is the median.
    """
    pairs, _ = sample_pairs(policy, arithmetic_examples(NUM_LOCATED_PROMPTS, split="report", seed=0), seed=0)
    wrong = [(prompt, pair.rejected) for prompt, pair in {str(pair.instruction): pair for pair in pairs}.items()]
    right = [(prompt, arithmetic_demonstration(prompt)) for prompt, _ in wrong]
    scored = choice_advantages(policy, q_rm, wrong + right)
    rows = []
    for (prompt, _), of_wrong, of_right in zip(wrong, scored, scored[len(wrong) :], strict=False):
        columns = enumerate(zip(of_wrong.tokens, of_right.tokens, strict=False))
        first = next(t for t, (a, b) in columns if a != b)
        values = of_wrong.advantages
        num_choices = sum(x != 0 for x in values)
        if num_choices > 1:
            hit = values[first] == min(values)
            rows.append((values[first], hit, 1 / num_choices, prompt, of_right, of_wrong))
    rows.sort(key=lambda row: row[0])
    _, hits, chances, *_ = zip(*rows, strict=True)
    return Located(mean(hits), mean(chances), len(rows), *rows[len(rows) // 2][3:])
