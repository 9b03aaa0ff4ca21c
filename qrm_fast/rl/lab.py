"""The laboratory: what the papers claim, on the embedded task, with seeds, controls and equal learning-rate sweeps.

An experiment is data: arms, each some options of `Config`. Every arm is swept over the same learning rates, on the
tuning problems and with a seed of its own; at its best one it is run again, with the other seeds, on the report
problems. Runs that are there already are read, not trained again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any, NamedTuple

from .arithmetic import arithmetic_examples
from .config import preset
from .data import Pair, read_rows, write_jsonl
from .demo import EMPTY, Q_RM, RL, THINKING, sample_pairs, train_start
from .implicit_training import DPOConfig, train_implicit
from .reward_training import ORMConfig, train_q_rm
from .train import train

LEARNING_RATES = (5e-5, 1e-4, 2e-4)
TUNING_SEED = 100
NUM_PAIR_PROMPTS, NUM_EVAL_PROMPTS = 1600, 256
SHARED = replace(RL, num_iterations=16, num_prompts=64, max_new_tokens=72, eval_every=4)
SAMPLED, GREEDY = "eval/pass@1_sampled", "eval/pass@1_greedy"

Options = dict[str, Any]
Rows = Sequence[Mapping[str, float]]


class Experiment(NamedTuple):
    claim: str
    arms: dict[str, Options]  # "lr_of" in place of a sweep: the arm whose learning rate a control takes
    columns: dict[str, str]  # metrics of the last iteration, and their names in the table
    level: float | None = None  # sampled Pass@1 to which tokens and seconds are counted


def _pure(**options: Any) -> Options:
    return preset("pure-paper") | dict(kl_coef=0.0, prm="arithmetic:noise=0.3") | options


def _scored(name: str, **options: Any) -> Options:
    """Scores of tokens, over those of the other answers to the prompt, without a critic."""
    return preset(name) | dict(kl_coef=0.0, scope="group", center=True) | options


def _both(arms: dict[str, Options]) -> dict[str, Options]:
    """Every arm under REINFORCE, and under PPO, which takes four clipped steps an iteration."""
    ppo = dict(algorithm="ppo", num_minibatches=4)
    return {f"{name}, REINFORCE": arm for name, arm in arms.items()} | {
        f"{name}, PPO": arm | ppo for name, arm in arms.items()
    }


_STEPS = {"process/num_steps": "steps", "response/length": "tokens"}
_HACKED = "arithmetic:noise=0.3,empty=0.9"
EXPERIMENTS = {
    "sum-vs-min": Experiment(
        "With a PRM that errs, the sum of step rewards is hacked, their minimum is not (arXiv 2504.15275).",
        {name: _pure(operator=name) for name in ("sum", "soft", "hard", "revmin", "causal_soft")}
        | {"random reward": _scored("qrm-paper", reward="random", lr_of="soft")},
        _STEPS,
    ),
    "qrm-vs-orm": Experiment(
        "Token scores of a Q-RM need fewer tokens to a Pass@1 than scores of answers (arXiv 2505.23363).",
        _both(
            {
                "Q-RM": _scored("qrm-paper", q_rm="q_rm"),
                "ORM": _scored("orm", orm="orm"),
                "DPO-RM": _scored("dpo-rm", implicit="dpo"),
                "PRM": _pure(),
                "verifier": preset("rloo"),
            }
        )
        | {
            "random reward": _scored("qrm-paper", reward="random", lr_of="Q-RM, REINFORCE"),
            "Q-RM, shuffled pairs": _scored("qrm-paper", q_rm="q_rm_shuffled", lr_of="Q-RM, REINFORCE"),
            "Q-RM, flipped pairs": _scored("qrm-paper", q_rm="q_rm_flipped", lr_of="Q-RM, REINFORCE"),
        },
        {"response/length": "tokens"},
        level=0.55,
    ),
    "hacking": Experiment(
        "A PRM that likes empty answers is hacked, unless step ends are masked or a tenth is verified (2504.15275).",
        {
            "openrlhf": _pure(prm=_HACKED, process="openrlhf"),
            "openrlhf, no mask": _pure(prm=_HACKED, process="openrlhf", mask_step_ends=False),
            "verl": _pure(prm=_HACKED, process="verl"),
            "verl, mask": _pure(prm=_HACKED, process="verl", mask_step_ends=True),
            "verl, 10 % verified": _pure(
                prm=_HACKED, process="verl", reward="pure=1.0,verifier=1.0", labelled_share=0.1
            ),
        },
        _STEPS | {"process/short": "short answers"},
    ),
    "noise": Experiment(
        "The minimum bears more noise of the PRM than the sum (arXiv 2504.15275, theorem 1).",
        {
            f"{operator}, noise {noise}": _pure(operator=operator, prm=f"arithmetic:noise={noise}")
            for noise in (0, 0.6, 1.2)
            for operator in ("soft", "sum")
        },
        _STEPS,
    ),
}


class Result(NamedTuple):
    lr: float
    sweep: dict[float, float]  # sampled Pass@1 on the tuning problems, by learning rate; empty for a control
    runs: list[Rows]  # metrics of every seed


def lab(experiment: str, seeds: int = 5, out: str = "runs/lab") -> dict[str, Result]:
    """Train what is not there yet of `experiment`, and write its table, table.md. Returns the results of every arm.

    Raises ValueError for an unknown experiment and for less than two seeds, which have no spread.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {experiment}")
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, got {seeds}")
    results: dict[str, Result] = {}
    for arm, options in EXPERIMENTS[experiment].arms.items():
        sweep = {}
        if "lr_of" in options:
            lr = results[options["lr_of"]].lr
        else:
            sweep = {lr: run_arm(experiment, arm, TUNING_SEED, lr, out)[-1][SAMPLED] for lr in LEARNING_RATES}
            lr = max(sweep, key=sweep.__getitem__)
        results[arm] = Result(lr, sweep, [run_arm(experiment, arm, seed, lr, out) for seed in range(seeds)])
        print(f"{arm:24} lr {lr:.0e}, sampled Pass@1 {spread([rows[-1][SAMPLED] for rows in results[arm].runs])}")
    (Path(out) / experiment / "table.md").write_text(table(EXPERIMENTS[experiment], results), encoding="utf-8")
    return results


def run_arm(experiment: str, arm: str, seed: int, lr: float, out: str) -> Rows:
    """The metrics of one run, which is trained if it is not there."""
    folder = Path(out) / experiment / arm.replace(" ", "_").replace(",", "") / f"lr{lr:.0e}_seed{seed}"
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    if rows and rows[-1]["step"] == SHARED.num_iterations:
        return rows
    options = {name: x for name, x in EXPERIMENTS[experiment].arms[arm].items() if name != "lr_of"}
    start = Path(out) / f"start{seed}"
    if not (start / "eval.jsonl").exists():
        start.mkdir(parents=True, exist_ok=True)
        train_start(start, seed, thinking=THINKING, empty=EMPTY)
        examples = arithmetic_examples(NUM_EVAL_PROMPTS, split="tuning" if seed == TUNING_SEED else "report", seed=seed)
        write_jsonl(start / "eval.jsonl", examples)
    for name in ("q_rm", "orm", "implicit"):
        if name in options:
            options[name] = reward_model(options[name], start, seed)
    config = replace(SHARED, model=f"{start}/sft", data=f"{start}/prompts.jsonl", eval_data=f"{start}/eval.jsonl")
    return train(replace(config, **options, seed=seed, lr=lr, out=str(folder))).metrics


def reward_model(name: str, start: Path, seed: int) -> str:
    """A reward model of the pairs of the policy in `start`, trained if it is not there."""
    if (start / name / "config.json").exists():
        return f"{start}/{name}"
    if not (start / "pairs.jsonl").exists():
        examples = arithmetic_examples(NUM_PAIR_PROMPTS, split="train", seed=10 * seed + 2)
        write_jsonl(start / "pairs.jsonl", sample_pairs(f"{start}/sft", examples, seed)[0])
    data = f"{start}/pairs.jsonl"
    kind, _, labels = name.rpartition("_") if name.startswith("q_rm_") else (name, "", "")
    if labels:
        coin = Random(seed)
        pairs = [
            Pair(p.instruction, p.rejected, p.chosen) if labels == "flipped" or coin.random() < 0.5 else p
            for p in read_rows(data, Pair)
        ]
        data = f"{start}/{labels}.jsonl"
        write_jsonl(data, pairs)
    settings = {
        field: getattr(Q_RM, field)
        for field in ("heldout", "num_epochs", "batch_size", "warmup_steps", "decay", "max_tokens")
    }
    shared: Options = settings | dict(data=data, model=f"{start}/sft", out=f"{start}/{name}", seed=seed, overwrite=True)
    if kind == "q_rm":
        train_q_rm(replace(Q_RM, **shared))
    elif kind == "orm":
        train_q_rm(ORMConfig(lr=Q_RM.lr, **shared))
    else:
        train_implicit(DPOConfig(lr=1e-4, **shared))
    return f"{start}/{name}"


# ---- tables


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


def table(experiment: Experiment, results: Mapping[str, Result]) -> str:
    """One line per arm: means and standard deviations over the seeds, in Markdown."""
    rates = " / ".join(f"{lr:.0e}" for lr in LEARNING_RATES)
    names = [
        "",
        f"sampled Pass@1 of the sweep, {rates}",
        "lr",
        "sampled Pass@1",
        "gain",
        "greedy Pass@1",
        *experiment.columns.values(),
        "ends below its start",
    ]
    if experiment.level is not None:
        names += [f"{what} to sampled {experiment.level:.2f}" for what in ("tokens", "seconds")]
    lines = [names, ["---"] * len(names)]
    for arm, (lr, sweep, runs) in results.items():
        evaluated = [[row for row in rows if SAMPLED in row] for rows in runs]
        start, end = ([rows[i] for rows in evaluated] for i in (0, -1))
        below = [at for at in map(falls_below_start, evaluated) if at is not None]
        cells = [
            arm,
            " / ".join(f"{x:.3f}" for x in sweep.values()),
            f"{lr:.0e}",
            spread([row[SAMPLED] for row in end]),
        ]
        cells.append(f"{fmean(b[SAMPLED] - a[SAMPLED] for a, b in zip(start, end, strict=True)):+.3f}")
        cells.append(spread([row[GREEDY] for row in end]))
        cells += [spread([rows[-1][key] for rows in runs]) if key in runs[0][-1] else "" for key in experiment.columns]
        cells.append(f"{len(below)} of {len(runs)}" + (f", from {', '.join(map(str, below))}" if below else ""))
        if experiment.level is not None:
            reached = [cost for cost in (cost_of(rows, experiment.level) for rows in runs) if cost is not None]
            short = "" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)})"
            for column in zip(*reached, strict=True) if reached else ((), ()):
                cells.append(f"{fmean(column):,.0f}{short}" if column else "not reached")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def falls_below_start(evaluated: Rows) -> int | None:
    """The iteration from which sampled Pass@1 stays below that of the start; None where it does not end there."""
    start = evaluated[0][SAMPLED]
    above = [i for i, row in enumerate(evaluated) if row[SAMPLED] >= start]
    return None if above[-1] == len(evaluated) - 1 else int(evaluated[above[-1] + 1]["step"])


def cost_of(rows: Rows, level: float) -> tuple[float, float] | None:
    """Tokens sampled and seconds of training until sampled Pass@1 is `level`, between two evaluations by a straight
    line; None where no evaluation reaches it."""
    tokens = seconds = 0.0
    before = (0.0, 0.0, 0.0)
    for row in rows:
        if row["step"]:
            tokens += row["response/length"] * SHARED.num_prompts * SHARED.group_size
            seconds += sum(x for name, x in row.items() if name.startswith("time/") and name != "time/evaluate_s")
        if SAMPLED not in row:
            continue
        if row[SAMPLED] >= level:
            share = 1.0 if row[SAMPLED] == before[0] else (level - before[0]) / (row[SAMPLED] - before[0])
            share = max(0.0, share)
            return before[1] + share * (tokens - before[1]), before[2] + share * (seconds - before[2])
        before = (row[SAMPLED], tokens, seconds)
    return None
