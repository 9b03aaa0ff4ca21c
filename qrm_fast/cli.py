"""The command line: one function per command, which reads its options, calls the library and prints what came out."""

import json
import os
import re
import sys
import time
import warnings
from argparse import ArgumentError
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from importlib.metadata import version
from inspect import getdoc
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

import torch

try:
    import yaml  # type: ignore[import-untyped]
    from jsonargparse import ArgumentParser, set_parsing_settings
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError(f"the command line needs the extra `train`: pip install 'qrm_fast[train]' ({error})") from error

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from .rl.implicit_training import DPOConfig, ImplicitConfig
    from .rl.reward_training import ORMConfig, QRMConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# ---- commands


def demo(parser: ArgumentParser, arguments: list[str]) -> None:
    """A method on the embedded arithmetic task, from fine-tuning to figures: Q-RM, or PURE (--method pure)."""
    parser.add_argument("--method", type=Literal["qrm", "pure"], default="qrm", help="qrm or pure.")
    parser.add_argument("--seeds", type=int, default=1, help="Train everything for the seeds 0, 1, ...")
    parser.add_argument(
        "--controls", action="store_true", help="Of qrm: also learn from the verifier, and from shuffled labels."
    )
    parser.add_argument("--out", type=str | None, help="Directory for all that is written: runs/demo, runs/demo_pure.")
    options = parser.parse_args(arguments)
    pure = options.method == "pure"
    if pure and options.controls:
        raise ValueError("controls are those of the method qrm, expected none with pure")
    _before_models("cpu")
    from .rl.demo import demo as run
    from .rl.demo import process_demo
    from .rl.plots import Answer, curves, heat_map, read_runs

    out = options.out or ("runs/demo_pure" if pure else "runs/demo")
    with _newest_row_shown(out):
        result = process_demo(options.seeds, out) if pure else run(options.seeds, options.controls, out)
    runs = read_runs(out)
    curves(runs).savefig(f"{out}/curves.png")
    print(f"\ncurves    {out}/curves.png")
    if result.located is None:
        learned = {name: rows for name, rows in runs.items() if not name.endswith("sft")}
        curves(learned, only=("Pass@1", "Steps per answer", "Reward: steps")).savefig(f"{out}/forms.png")
        print(f"forms     {out}/forms.png")
    else:
        answers = [Answer(name, *getattr(result.located, name)) for name in ("right", "wrong")]
        heat_map(result.located.prompt, answers, advantages=True).savefig(f"{out}/heat_map.png")
        print(f"heat map  {out}/heat_map.png, of the wrong answer with the median advantage at its first wrong token")
    print(result.summary)


def lab(parser: ArgumentParser, arguments: list[str]) -> None:
    """Test a claim of the papers on the embedded task: seeds, learning-rate sweeps, controls; a table and a figure."""
    parser.add_argument(
        "--experiment", type=str, required=True, help="qrm-vs-orm, sum-vs-min, hacking or noise: see docs/methods.md."
    )
    parser.add_argument("--seeds", type=int, default=5, help="Report the seeds 0, 1, ...")
    parser.add_argument("--out", type=str, default="runs/lab", help="Directory; runs that are there are not run again.")
    options = parser.parse_args(arguments)
    _before_models("cpu")
    from matplotlib import rc_context

    from .rl.lab import EXPERIMENTS, GREEDY, SAMPLED
    from .rl.lab import lab as run
    from .rl.plots import spreads

    with _newest_row_shown(options.out):
        results = run(options.experiment, options.seeds, options.out)
    folder, experiment = f"{options.out}/{options.experiment}", EXPERIMENTS[options.experiment]
    keys = {SAMPLED: "sampled Pass@1", GREEDY: "greedy Pass@1", **experiment.columns}
    figure = spreads({arm: result.runs for arm, result in results.items()}, keys)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lab"}):  # words as text, the same bytes again
        figure.savefig(f"{folder}/figure.svg", metadata={"Date": None})
    print(f"\n{experiment.claim}\ntable   {folder}/table.md\nfigure  {folder}/figure.svg")


def sft(parser: ArgumentParser, arguments: list[str]) -> None:
    """Fine-tune a policy on demonstrations."""
    from .rl.sft import SFTConfig, train_sft

    _add_options(parser, SFTConfig, out="runs/sft")
    config = _parse(parser, arguments, SFTConfig)
    with _newest_row_shown(config.out):
        result = train_sft(config)
    rows = [
        ("loss per token, last tenth of the steps", f"{result.loss:.4f}"),
        ("tokens/s", f"{result.tokens_per_s:,.0f}"),
    ]
    _print_table("Fine-tuning", ("", ""), rows)
    print(f"policy  {result.directory}")


# The library's defaults are for pretrained networks; one that starts from nothing needs larger steps, and more of them.
FROM_SCRATCH = dict(lr=3e-4, num_epochs=2, batch_size=32, warmup_steps=8, decay=0.8)


def train_rm(parser: ArgumentParser, arguments: list[str]) -> None:
    """Train a reward model: Q-RM, ORM and DPO on pairs, a PRM on solutions with step labels, ... (--kind)."""
    # The kind decides which options there are, as a command would.
    kinds: dict[str, Callable[[ArgumentParser, list[str]], None]] = {
        "qrm": _train_q_rm,
        "qrm-vocab": _train_q_rm,
        "orm": _train_orm,
        "prm": _train_prm,
        "dpo": _train_dpo,
        "implicit": _train_implicit,
    }
    kind = _kind(arguments) or "qrm"
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind}")
    parser.epilog = f"--kind chooses among {', '.join(kinds)}; each has its own options. " + (
        f"Defaults for scratch models: {', '.join(f'{key} {value}' for key, value in FROM_SCRATCH.items())}."
    )
    kinds[kind](parser, arguments)


def _kind(arguments: list[str]) -> str | None:
    """What --kind says, or else the file of --config. A file that cannot be read is left to the parser to refuse."""
    said = dict(x.split("=", 1) for x in arguments if x.startswith("--") and "=" in x) | dict(pairwise(arguments))
    if "--kind" in said or "--config" not in said:
        return said.get("--kind")
    try:
        values = yaml.safe_load(Path(said["--config"]).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return str(values["kind"]) if isinstance(values, dict) and "kind" in values else None


def _train_q_rm(parser: ArgumentParser, arguments: list[str]) -> None:
    from .rl.reward_training import QRMConfig

    _add_options(parser, QRMConfig, out="runs/q_rm")
    _train_on_pairs(_parse(parser, arguments, QRMConfig, _from_scratch), "Q-RM")


def _train_orm(parser: ArgumentParser, arguments: list[str]) -> None:
    from .rl.reward_training import ORMConfig

    _add_options(parser, ORMConfig, out="runs/orm")
    _train_on_pairs(_parse(parser, arguments, ORMConfig, _from_scratch), "ORM")


def _train_on_pairs(config: "QRMConfig | ORMConfig", name: str) -> None:
    from .rl.reward_training import train_q_rm

    with _newest_row_shown(config.out):
        result = train_q_rm(config)
    sides = (("trained on", result.train, result.num_train), ("held out", result.heldout, result.num_heldout))
    rows = []
    for side_name, side, num in sides:
        if side is None:
            continue
        accuracies = (_share(share, num) for share in (side.accuracy, side.action_accuracy))
        rows.append((f"{num} pairs {side_name}", *accuracies, f"{side.margin:.3f}", f"{side.loss:.4f}"))
    _print_table(name, ("", "pair accuracy", "at the first difference", "Q margin", "loss"), rows)
    print(f"{result.tokens_per_s:,.0f} tokens/s\n{name}  {result.directory}")


def _train_prm(parser: ArgumentParser, arguments: list[str]) -> None:
    from .rl.plots import calibration
    from .rl.prm_training import PRMConfig, train_prm

    _add_options(parser, PRMConfig, out="runs/prm")
    config = _parse(parser, arguments, PRMConfig, _from_scratch)
    with _newest_row_shown(config.out):
        result = train_prm(config)
    sides = [(result.num_train, "trained on", result.train)]
    if result.heldout is not None:
        sides.append((result.num_heldout, "held out", result.heldout))
    names = ("loss per step", "right judgements of steps", "of the wrong ones", "of the right ones")
    columns = [
        [
            f"{side.loss:.4f}",
            *(f"{share:.3f}" for share in (side.accuracy, side.wrong_found, side.right_kept)),
            _share(side.first_error, num),
            f"{side.calibration_error:.3f}",
        ]
        for num, _, side in sides
    ]
    rows = list(zip((*names, "first wrong step found", "calibration error"), *columns, strict=True))
    _print_table("PRM", ("", *(f"{num} solutions {name}" for num, name, _ in sides)), rows)
    calibration(result.bins).savefig(f"{result.directory}/calibration.png")
    print(f"{result.tokens_per_s:,.0f} tokens/s\ncalibration  {result.directory}/calibration.png")
    print(f"PRM  {result.directory}")


def _train_dpo(parser: ArgumentParser, arguments: list[str]) -> None:
    from .rl.implicit_training import DPOConfig

    _add_options(parser, DPOConfig, out="runs/dpo")
    _train_log_ratio(_parse(parser, arguments, DPOConfig), "DPO", "pairs")


def _train_implicit(parser: ArgumentParser, arguments: list[str]) -> None:
    from .rl.implicit_training import ImplicitConfig

    _add_options(parser, ImplicitConfig, out="runs/implicit")
    _train_log_ratio(_parse(parser, arguments, ImplicitConfig), "Implicit reward model", "answers")


def _train_log_ratio(config: "DPOConfig | ImplicitConfig", name: str, what: str) -> None:
    from .rl.implicit_training import train_implicit

    with _newest_row_shown(config.out):
        result = train_implicit(config)
    sides = (("trained on", result.train, result.num_train), ("held out", result.heldout, result.num_heldout))
    rows = [
        (f"{num} {what} {side_name}", _share(side.accuracy, num), f"{side.margin:.3f}", f"{side.loss:.4f}")
        for side_name, side, num in sides
        if side is not None
    ]
    _print_table(name, ("", "accuracy", "margin", "loss"), rows)
    print(f"{result.tokens_per_s:,.0f} tokens/s\n{name}  {result.directory}")


def _from_scratch(options: dict[str, Any]) -> dict[str, Any]:
    """The defaults that hang on the model."""
    if not options["model"].startswith("scratch:"):
        return {}
    return FROM_SCRATCH | (dict(num_head_epochs=0) if options["kind"] == "prm" else {})  # no backbone to keep as it is


def train(parser: ArgumentParser, arguments: list[str]) -> None:
    """Train a policy by reinforcement learning, credited token by token by a Q-RM or answer by answer by a verifier."""
    from .rl import ranks
    from .rl.config import PRESETS, Config, preset
    from .rl.train import train as run

    _add_options(parser, Config, out="runs/train")
    names = ", ".join(dict.fromkeys(name for name, _ in PRESETS))
    parser.add_argument(
        "--preset", type=str, default="qrm-released", help=f"Defaults of the options that tell methods apart: {names}."
    )
    config = _parse(parser, arguments, Config, lambda options: preset(options["preset"], options["algorithm"]))
    ranks.connect(config.device)
    with _newest_row_shown(config.out) if ranks.is_first() else nullcontext():
        result = run(config)
    ranks.disconnect()
    if not ranks.is_first():
        return
    if result.before is not None and result.after is not None:
        rows = [
            (name, f"{a:.3f}", f"{b:.3f}")
            for name, a, b in zip(result.before._fields, result.before, result.after, strict=True)
        ]
        _print_table("Pass@1", ("", "before", "after"), rows)
    _print_table("Phases", ("", "s", "tokens/s"), _phases(result.metrics))
    print(f"policy  {result.directory}")


def evaluate(parser: ArgumentParser, arguments: list[str]) -> None:
    """Greedy and sampled Pass@1 of a policy; with --best_of, of the answers that a reward model would choose."""
    from .rl.attention import check_packing
    from .rl.best_of import Judge, best_of, check_choice, early_reject, sample_answers
    from .rl.config import Config
    from .rl.models import check_context, load_policy, num_token_ids
    from .rl.policy import Policy
    from .rl.ranges import check_ranges
    from .rl.rollout import TransformersEngine, check_sampling
    from .rl.tokenizers import load_tokenizer, stop_ids
    from .rl.train import evaluate as run
    from .rl.train import longest_answer
    from .rl.verifiers import read_examples

    only = ("model", "data", "verifier", "max_new_tokens", "eval_samples", "max_tokens", "seed", "device", "dtype")
    _add_options(parser, Config, only=only)
    parser.add_argument("--best_of", type=int, default=1, help="Answers to choose from, sampled to each problem.")
    parser.add_argument("--rerank", type=str, default="verifier", help="Who chooses: qrm, prm, orm or verifier.")
    parser.add_argument("--reward_model", type=str | None, help="Directory or id of the Q-RM, PRM or ORM that chooses.")
    parser.add_argument(
        "--aggregation",
        type=str | None,
        help="From tokens or steps to an answer: mean (Q-RM's), min, last (ORM's), product, soft-min (PRM's).",
    )
    parser.add_argument(
        "--early_reject", type=int, default=0, help="Drop the half of the answers that scores lowest by then: tokens."
    )
    parser.add_argument("--plot", type=str | None, help="PNG file to draw: right answers by tokens sampled.")
    config = _parse(parser, arguments, Config, out="")
    options = parser.parse_args(arguments)
    aggregation = check_choice(options.rerank, options.reward_model, options.aggregation)
    if options.best_of < 1:
        raise ValueError(f"best_of must be at least 1, got {options.best_of}")
    for name in ("reward_model", "plot"):  # an aggregation needs a reward_model
        if options.best_of == 1 and options[name] is not None:
            raise ValueError(f"{name} needs best_of above 1: of one answer there is no choice, got {options[name]}")
    if options.early_reject < 0 or (options.early_reject and (options.best_of == 1 or options.reward_model is None)):
        raise ValueError(f"early_reject needs best_of and a reward_model, and at least 0, got {options.early_reject}")
    check_ranges(config)
    examples = read_examples(config.data, config.verifier)
    tokenizer = load_tokenizer(config.model)
    model = load_policy(config.model, tokenizer, device=config.device, dtype=getattr(torch, config.dtype))
    policy = Policy(model, num_ids=num_token_ids(tokenizer))
    engine = TransformersEngine(policy, stop_ids(tokenizer, model.generation_config))
    longest = longest_answer(examples, tokenizer, config)
    check_context(model, longest)
    check_packing(model, longest)
    check_sampling(engine, policy, longest)
    if options.best_of == 1:
        result = run(engine, tokenizer, examples, config)
        rows = [(name, _share(share, len(examples))) for name, share in result._asdict().items()]
        _print_table(f"Pass@1 on {len(examples)} problems", ("", "right answers"), rows)
        return
    judge = None
    if options.reward_model is not None:
        how: dict[str, Any] = dict(aggregation=aggregation, longest=longest, config=config)
        judge = Judge(options.rerank, options.reward_model, tokenizer, **how)
    answers = sample_answers(engine, tokenizer, examples, config, options.best_of, judge)
    results = best_of(answers)
    rows_of_k = [
        (str(x.num_answers), _share(x.accuracy, len(examples)), f"{x.some_right:.3f}", f"{x.num_tokens:,.0f}")
        for x in results
    ]
    title = f"Best of k on {len(examples)} problems, chosen by {options.rerank}"
    _print_table(title, ("k", "right answers", "one of k right", "tokens per problem"), rows_of_k)
    if judge is not None and options.early_reject:
        early = early_reject(answers, judge, options.early_reject)
        print(
            f"half dropped after {options.early_reject} tokens: {_share(early.accuracy, len(examples))} right, "
            f"{early.num_tokens:,.0f} tokens per problem, {early.saved:.1%} saved"
        )
    if options.plot:
        from .rl.plots import accuracy_by_tokens

        accuracy_by_tokens(results, options.rerank).savefig(options.plot)
        print(f"best of k  {options.plot}")


def score(parser: ArgumentParser, arguments: list[str]) -> None:
    """What a Q-RM gives every token of an answer, and where two answers part; what a PRM gives every step."""
    parser.add_argument("--model", type=str, required=True, help="The Q-RM or PRM: Hugging Face id or directory.")
    parser.add_argument("--prompt", type=str, required=True)
    parser.add_argument(
        "--response", type=str, action="append", required=True, help="An answer; give it twice for two."
    )
    parser.add_argument("--plot", type=str, help="PNG file to draw: the tokens coloured by their Q.")
    parser.add_argument("--device", type=str, default="cpu")
    options = parser.parse_args(arguments)
    if len(options.response) > 2:
        raise ValueError(f"response must be given once or twice, got {len(options.response)}")
    _before_models(options.device)
    from .rl.models import num_labels

    if num_labels(options.model) == 2:
        _score_steps(options.model, options.prompt, options.response, options.device, options.plot)
        return
    from .rl.plots import Answer, first_difference, heat_map
    from .rl.score import score as run

    scores = run(options.model, options.prompt, options.response, device=options.device)
    answers = [Answer(f"response {i}", x.tokens, x.q) for i, x in enumerate(scores, start=1)]
    fork = first_difference(answers)
    rows = []
    for t in range(max(len(answer.tokens) for answer in answers)):
        row = [str(t)]
        for tokens, q, normalized in scores:
            row += [repr(tokens[t]), f"{q[t]:.4f}", f"{normalized[t]:+.2f}"] if t < len(tokens) else ["", "", ""]
        if fork is not None and t <= fork:
            row.append(f"{scores[0].q[t] - scores[1].q[t]:+.4f}")
        rows.append(row)
    header = ["", *len(scores) * ["token", "Q", "scaled"], *(len(scores) - 1) * ["difference"]]
    _print_table("Q of every token; scaled: (Q - mean) / std over all of them", header, rows)
    if options.plot:
        heat_map(options.prompt, answers).savefig(options.plot)
        print(f"heat map  {options.plot}")


def _score_steps(model: str, prompt: str, responses: list[str], device: str, plot: str | None) -> None:
    from .rl.score import score_steps

    if plot:
        raise ValueError(f"plot draws the tokens of a Q-RM, expected none for a PRM, got {plot}")
    for number, scores in enumerate(score_steps(model, prompt, responses, device=device), start=1):
        rows = [
            (str(t), repr(step), f"{reward:+.4f}", f"{weight:.3f}")
            for t, (step, reward, weight) in enumerate(zip(*scores[:3], strict=True))
        ]
        title = f"Reward of every step of response {number}; their soft minimum is {scores.outcome:+.4f}"
        _print_table(title, ("", "step", "reward", "weight"), rows)


def merge(parser: ArgumentParser, arguments: list[str]) -> None:
    """Write an adapter (LoRA) and its base as one whole model."""
    parser.add_argument("--model", type=str, required=True, help="The adapter: Hugging Face id or directory.")
    parser.add_argument("--out", type=str, required=True, help="A new directory for the model.")
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32")
    options = parser.parse_args(arguments)
    _before_models("cpu")
    from .rl.merge import merge as run

    run(options.model, options.out, dtype=getattr(torch, options.dtype))
    print(f"model  {options.out}")


def plot(parser: ArgumentParser, arguments: list[str]) -> None:
    """Draw the metrics of every training in a directory and below it into curves.png there."""
    parser.add_argument("directory", type=str, help="Where a command wrote: runs/demo, runs/train, ...")
    directory = parser.parse_args(arguments).directory
    from .rl.plots import curves, read_runs

    curves(read_runs(directory)).savefig(f"{directory}/curves.png")
    print(f"curves  {directory}/curves.png")


def plan(parser: ArgumentParser, arguments: list[str]) -> None:
    """What an iteration of training would cost: seconds, tokens/s and memory, on this CPU or on GPUs. An estimate."""
    from .rl.cost_model import Scenario
    from .rl.cost_model import plan as run

    _add_options(parser, Scenario)
    options = _options(parser, arguments, Scenario)
    result = run(Scenario(**{field.name: options[field.name] for field in fields(Scenario)}))
    phases = {**result.phases, "step": result.step}
    rows = [
        ("s", *(f"{phase.seconds:,.3g}" for phase in phases.values())),
        ("tokens/s", *(f"{phase.num_tokens / phase.seconds:,.0f}" for phase in phases.values())),
    ]
    for part in result.step.parts:
        rows.append((part, *(f"{phase.parts.get(part, 0) / phase.seconds:.0%}" for phase in phases.values())))
    _print_table("An iteration, estimated", ("", *phases), rows)
    memory = [(name, f"{num_bytes / 1e9:,.1f}") for name, num_bytes in result.memory.items() if num_bytes]
    memory.append(("in all", f"{sum(result.memory.values()) / 1e9:,.1f}"))
    _print_table("Memory of a device at its peak", ("", "GB"), memory)
    print(f"micro-batches  {result.max_tokens:,} packed tokens fit")
    print(f"our kernels    {result.kernels:.1%} of the step: heads and losses, the most that a faster one could save")
    ceilings = result.ceilings
    print(
        f"ceilings       {ceilings.products / 1e12:,.3g} TFLOP/s of products, {ceilings.copy / 1e9:,.3g} GB/s copied, "
        f"{1e6 * ceilings.call:.3g} us a call: {ceilings.source}"
    )


def doctor(parser: ArgumentParser, arguments: list[str]) -> None:
    """Versions, devices, and which file serves each op on each of them."""
    parser.parse_args(arguments)
    from .doctor import main

    main()


COMMANDS: dict[str, Callable[[ArgumentParser, list[str]], None]] = {
    "demo": demo,
    "sft": sft,
    "train-rm": train_rm,
    "train": train,
    "eval": evaluate,
    "score": score,
    "merge": merge,
    "plot": plot,
    "lab": lab,
    "plan": plan,
    "doctor": doctor,
}
USAGE = "\n".join(
    [
        "usage: qrm-fast COMMAND [options]",
        "",
        *(f"  {name:10}{getdoc(command)}" for name, command in COMMANDS.items()),
        "",
        "qrm-fast COMMAND --help lists the options; those of a training may stand in a YAML file, --config FILE.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Exit status: 0, 2 after one line on what was wrong, 1 without a reader, 128 and a signal's number after it.
    """
    warnings.showwarning = _show_warning
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        print(f"qrm-fast {version('qrm_fast')}")
        return 0
    if name not in COMMANDS:
        print(f"qrm-fast: error: command must be one of {', '.join(COMMANDS)}, got {name}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    # no abbreviations: the next option that is added would change what they mean
    parser = ArgumentParser(
        prog=f"qrm-fast {name}", description=getdoc(command), exit_on_error=False, allow_abbrev=False
    )
    try:
        command(parser, list(map(_underscored, rest)))
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from .rl.ranks import is_loss
        from .rl.run_folder import Stopped

        if isinstance(error, Stopped):
            print(f"qrm-fast {name}: {error}", file=sys.stderr)
            return 128 + error.number
        if is_loss(error):
            print(f"qrm-fast {name}: error: another process of this run has ended: go on with resume", file=sys.stderr)
            return 2
        # A bare Exception is how tokenizers refuses a text outside a fixed alphabet. All else is a fault of ours.
        expected = ArgumentError | ValueError | OSError | FloatingPointError
        if not isinstance(error, expected) and type(error) is not Exception:
            raise
        print(f"qrm-fast {name}: error: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


# ---- options


def _underscored(argument: str) -> str:
    """--model-shape as --model_shape."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if re.match("--[a-z]", name) else argument


Config = TypeVar("Config", bound="DataclassInstance")


def _add_options(parser: ArgumentParser, config: type, *, only: Sequence[str] = (), **defaults: object) -> None:
    """An option for every field of a configuration (or for `only` some) and --config, a file of them."""
    parser.add_argument("--config", action="config", help="YAML file of the options below; those given here win.")
    skip = {field.name for field in fields(config) if only and field.name not in only}
    parser.add_class_arguments(config, as_group=False, skip=skip)
    parser.set_defaults(**defaults)
    flags = {field.name for field in fields(config) if field.type in (bool, bool | None)}
    for action in parser._actions:
        action.required &= action.dest not in defaults
        if action.dest in flags:
            action.nargs, action.const = "?", True  # "--resume" says as much as "--resume true"


def _parse(
    parser: ArgumentParser,
    arguments: Sequence[str],
    config: type[Config],
    defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: {},
    **fixed: object,
) -> Config:
    """The configuration that `arguments` give. Some of its defaults may hang on other options: `defaults(options)`."""
    given = [x for x in arguments if x.split("=")[0] != "--print_config"]  # which ends the program
    parser.set_defaults(**defaults(_options(parser, given, config)))
    options = _options(parser, arguments, config)
    _before_models(options["device"])
    return config(**{field.name: options[field.name] for field in fields(config) if field.name in options} | fixed)


def _options(parser: ArgumentParser, arguments: Sequence[str], config: type) -> dict[str, Any]:
    """What `arguments` give. Refuses null, which the parser takes for every option, where the field has no None."""
    options = parser.parse_args(arguments).as_dict()
    for name, hint in get_type_hints(config).items():
        if name in options and options[name] is None and type(None) not in get_args(hint):
            raise ValueError(f"{name} must be {getattr(hint, '__name__', hint)}, got null")
    return options


def _before_models(device: str) -> None:
    """Refuse a device that torch does not have here; keep transformers' bars and reports out of what a command prints.

    It reports weights that a model lacks, such as the head of a Q-RM to be; those it must not lack we refuse.
    """
    from transformers.utils import logging

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the second
        raise ValueError(f"device must be one that torch can use here, got {device}: {error}") from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _sentence(error: Exception) -> str:
    """An error in one line; those of the option parser in the words of ours."""
    text = " ".join(str(error).split()).replace('"<unicode string>"', "the file")
    text = re.sub(r"<class '(?:builtins\.)?(\w+)'>", r"\1", text).replace("typing.", "").replace("NoneType", "None")
    text = re.sub(r'^Parser key "(\S+)": Expected an? (.*)\. Got value: (.*)$', r"\1 must be \2, got \3", text)
    text = re.sub(
        r'^Parser key "(\S+)": Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: (.*)$',
        r"\1 must be one of \2, got \3",
        text,
    )
    return re.sub(r"must be (?:one of )?Literal\[(.*?)\]", r"must be one of \1", text)


# ---- what people see


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"qrm-fast: note: {' '.join(str(message).split())}", file=sys.stderr)


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text, or square brackets would be read as markup
    console = Console()
    console.print(table, width=None if console.is_terminal else 200)  # a file has no edge to fold tokens at


def _share(share: float, num: int) -> str:
    """A share of `num` with its standard error."""
    return f"{share:.3f} ± {(share * (1 - share) / num) ** 0.5:.3f}"


def _phases(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """Seconds and, where tokens were counted, tokens per second of every phase of a training."""
    seconds: dict[str, float] = defaultdict(float)
    num_tokens: dict[str, float] = defaultdict(float)
    for row in rows:
        for key in row:
            if key.startswith("time/"):
                phase = key.removeprefix("time/").removesuffix("_s")
                seconds[phase] += row[key]
                num_tokens[phase] += row[key] * row.get(f"perf/{phase}_tokens_per_s", 0)
    return [
        (phase, f"{s:.1f}", f"{num_tokens[phase] / s:,.0f}" if num_tokens[phase] else "")
        for phase, s in seconds.items()
    ]


@contextmanager
def _newest_row_shown(directory: str) -> Iterator[None]:
    """While a training writes below `directory`, show a terminal the newest row of its metrics."""
    console = Console()
    if not console.is_terminal:
        yield
        return
    start, done = time.time(), Event()

    def follow() -> None:
        while not done.wait(1.0):
            written = [(path.stat().st_mtime, path) for path in Path(directory).rglob("metrics.jsonl")]
            if written and max(written)[0] >= start:
                path = max(written)[1]
                row = path.read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2]  # the last whole line
                status.update(Text(_in_short(path.parent, json.loads(row or "{}"))))

    with console.status("starting") as status:
        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _in_short(directory: Path, row: Mapping[str, float | None]) -> str:
    """Step, the first metrics, tokens per second of every phase that has them, MFU."""
    known = {key: value for key, value in row.items() if value is not None}
    values = [f"{key} {value:.4g}" for key, value in known.items() if not key.startswith(("time/", "perf/"))]
    speeds = {key.removeprefix("perf/"): x for key, x in known.items() if key.endswith("_tokens_per_s")}
    values[6:] = [f"{key.removesuffix('_tokens_per_s')} {x:,.0f} tokens/s" for key, x in speeds.items()]
    if "perf/update_mfu" in known:
        values.append(f"MFU {known['perf/update_mfu']:.1%}")
    return f"{directory}: {'  '.join(values)}"


if __name__ == "__main__":
    sys.exit(main())
