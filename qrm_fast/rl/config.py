"""The options of the loop: every field has a value; a preset is a set of values for those that tell methods apart."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..ops.loss_weights import MODES
from . import ranks
from .ranges import Count, CountOrNone, NonNegative, Positive, Share, check_ranges
from .run_folder import RunOptions
from .verifiers import find_verifier

Importance = Literal["none", "truncate-token", "mask-token", "truncate-sequence", "mask-sequence"]

# The kinds of reward that `Config.reward` names, each a class of rewards.py.
TOKEN_SCORES = ("q-rm", "qrm-vocab", "orm", "implicit", "random")
STREAMS = (*TOKEN_SCORES, "pure", "verifier")
MIXTURE = "pure=1.0,verifier=1.0"
CPU_TOKENS, GPU_TOKENS = 2048, 8192  # of a micro-batch: on a CPU products of more rows are no faster, and take memory
ANNEALED = ("kl_coef", "entropy_coef", "clip_low", "clip_high")

# What a preset sets, per algorithm; a field given beside it wins. The Q-RM presets are the released code, the paper's
# Algorithm 1 and its Proposition 3.4 (arXiv 2505.23363), orm and dpo-rm what the released code compares with. Those of
# PURE are its eq. 7, its eq. 8 and its two codes (arXiv 2504.15275). prime (arXiv 2502.01456) fits an implicit reward
# model to the verifier. rloo (arXiv 2402.14740), grpo (2402.03300) and dr-grpo (2503.20783) credit answers that a
# verifier judges.
_COMMON = dict(center=False, eos_rescore="none", process="paper", estimator="own", baseline="rloo")
_COMMON |= dict(value_coef=0.0, value_normalize=True, loss_mode="token-mean", gamma=1.0, lam=0.95, implicit_lr=0.0)
_RELEASED = _COMMON | dict(reward="q-rm", kl_estimator="abs", kl_in="reward")
_PAPER = _COMMON | dict(reward="q-rm", center=True, kl_estimator="k1", kl_in="reward")
_SUMMED = _RELEASED | dict(estimator="gae", gamma=0.9, lam=0.8, kl_coef=0.01)
_PURE = _COMMON | dict(reward="pure", kl_coef=0.001, kl_estimator="k1", kl_in="reward")
_VERIFIER = _COMMON | dict(reward="verifier", kl_coef=0.0, kl_estimator="k3", kl_in="loss")
_PRIME = _VERIFIER | dict(reward="implicit=1.0,verifier=1.0", implicit_lr=1e-6)
_OF_ANSWERS: dict[str, dict[str, Any]] = {
    "pure-paper": _PURE,
    "pure-paper-step": _PURE | dict(process="paper-step"),
    "pure-openrlhf": _PURE | dict(process="openrlhf", loss_mode="seq-mean-token-mean"),
    "pure-verl": _PURE | dict(process="verl", kl_estimator="k3"),
    "prime": _PRIME,
    "rloo": _VERIFIER,
    "grpo": _VERIFIER | dict(baseline="grpo", loss_mode="seq-mean-token-mean"),
    "dr-grpo": _VERIFIER | dict(baseline="dr_grpo", loss_mode="seq-mean-token-sum-norm"),
}
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("qrm-released", "reinforce"): _RELEASED | dict(kl_coef=0.0, eos_rescore="mean"),
    ("qrm-released", "ppo"): _RELEASED | dict(kl_coef=0.01, value_coef=0.01),
    ("qrm-paper", "reinforce"): _PAPER | dict(kl_coef=0.0),
    ("qrm-paper", "ppo"): _PAPER | dict(kl_coef=0.01, value_coef=1.0, value_normalize=False),
    ("qrm-vocab", "reinforce"): _COMMON | dict(reward="qrm-vocab", kl_coef=0.0, kl_estimator="k1", kl_in="reward"),
    ("qrm-vocab", "ppo"): _COMMON | dict(reward="qrm-vocab", kl_coef=0.01, kl_estimator="k1", kl_in="reward"),
    ("orm", "reinforce"): _RELEASED | dict(reward="orm", kl_coef=0.0),
    ("orm", "ppo"): _SUMMED | dict(reward="orm"),
    ("dpo-rm", "reinforce"): _RELEASED | dict(reward="implicit", kl_coef=0.0, eos_rescore="mean"),
    ("dpo-rm", "ppo"): _SUMMED | dict(reward="implicit"),
    **{(name, algorithm): values for name, values in _OF_ANSWERS.items() for algorithm in ("reinforce", "ppo")},
}


def preset(name: str, algorithm: str = "reinforce") -> dict[str, Any]:
    """The fields of `Config` that the preset `name` sets for `algorithm`: `Config(..., **preset("rloo"))`.

    Raises ValueError for an unknown one.
    """
    if (name, algorithm) not in PRESETS:
        names, algorithms = (", ".join(dict.fromkeys(column)) for column in zip(*PRESETS, strict=True))
        raise ValueError(f"preset must be one of {names} and algorithm one of {algorithms}, got {name} and {algorithm}")
    return {"algorithm": algorithm, **PRESETS[name, algorithm]}


@dataclass(kw_only=True)
class Config(RunOptions):
    model: str
    """The policy to start from: Hugging Face id, directory or GGUF file."""
    data: str
    """JSONL file of prompts: {"instruction"}, and {"label"} for the reward "verifier"."""
    q_rm: str | None = None
    """Directory or id of the Q-RM; needed where the reward is "q-rm", or "qrm-vocab" for one with a vocabulary head."""
    prm: str | None = None
    """Directory or id of the PRM; needed where the reward is "pure". "arithmetic:noise=0.3" judges the steps of the
    embedded task by their labels, and errs by so much."""
    orm: str | None = None
    """Directory or id of the ORM; needed where the reward is "orm"."""
    implicit: str | None = None
    """Directory or id of a model trained with --kind dpo or implicit; needed where the reward is "implicit". With
    implicit_lr None is a copy of the policy."""
    eval_data: str | None = None
    """JSONL file of prompts with labels, on which Pass@1 is measured."""
    verifier: str = "number"
    """Who judges answers, in evaluation and for the reward "verifier": "number", "math" or "arithmetic"."""
    algorithm: Literal["reinforce", "ppo"] = "reinforce"

    reward: str = "q-rm"
    """Token scores of the Q-RM ("q-rm"; "qrm-vocab": over what the policy expects of it), step scores of the PRM
    ("pure"), scores of answers ("orm"), log-ratios of tokens ("implicit"), answers judged by the verifier ("verifier"),
    one normal draw per answer ("random", a control), or a weighted mixture: "pure=1.0,verifier=1.0"."""
    labelled_share: Share = 1.0
    """Share of the labelled prompts on which a mixture uses the verifier; a prompt without a label is never judged."""
    implicit_lr: NonNegative = 0.0
    """Learning rate with which the implicit reward model follows the verifier, step by step beside the policy (PRIME);
    0: it stays as it is."""
    implicit_beta: Positive = 0.05
    """Scale of the log-ratio of one that starts as the policy; a trained one has its own."""
    center: bool = False
    """Subtract the mean of the token scores before they are scaled."""
    scope: Literal["batch", "sequence", "group"] = "batch"
    """Over which tokens that mean and the scale are taken; a group is the answers to one prompt."""
    eos_rescore: Literal["none", "mean"] = "mean"
    """Give the last token of an answer the mean score of its tokens."""
    min_std_share: NonNegative = 0.5
    """Lower bound of the scale, as a share of the first iteration's: a satisfied Q-RM must not amplify noise."""
    baseline: Literal["rloo", "grpo", "dr_grpo", "none"] = "rloo"
    """Baseline of the reward "verifier" among the answers to one prompt."""
    overlong_tokens: CountOrNone = 0
    """The verifier's reward falls by 1 over the last tokens of max_new_tokens, this many (arXiv 2503.14476, eq. 13)."""
    process: Literal["paper", "paper-step", "openrlhf", "verl"] = "paper"
    """Baseline and whitening of the reward "pure": a preset of `process_advantages`."""
    mask_step_ends: bool | None = None
    """Whether the tokens that end a step stay out of the reward "pure"; null: as `process` has it, "openrlhf" alone."""
    operator: Literal["soft", "hard", "revmin", "causal_soft", "sum", "mean"] = "soft"
    """How step rewards become returns: an operator of `min_form_returns`."""
    process_temperature: NonNegative = 0.1
    """Of the operators "soft" and "causal_soft"."""
    estimator: Literal["own", "gae", "min-gae"] = "own"
    """Where advantages come from: what the reward's method says, or a critic: `gae` of all rewards, or `min_gae` of the
    step rewards of "pure"."""
    gamma: Share = 1.0
    """Discount of "gae", and of an implicit reward model that learns."""
    lam: Share = 0.95
    """Lambda of "gae" and "min-gae"."""
    kl_coef: NonNegative = 0.0
    """Weight of the distance to the starting policy; 0: no reference model."""
    kl_estimator: Literal["abs", "k1", "k2", "k3"] = "abs"
    """The distance, from the two log-probabilities of a token; "abs" exists in the reward only."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Taken off the token rewards once, or added to the loss at every update."""
    adaptive_kl: NonNegative = 0.0
    """KL per token to the starting policy that kl_coef is steered to, a step after every iteration
    (arXiv 1909.08593, section 2.2); 0: kl_coef stays."""
    value_coef: NonNegative = 0.0
    """Weight of a critic's value in the advantage; 0: no critic."""
    value_normalize: bool = True
    """Divide the values by their standard deviation first."""

    num_iterations: Count = 100
    num_prompts: Count = 128
    """Prompts per iteration."""
    group_size: Count = 4
    """Answers sampled to each prompt."""
    max_new_tokens: Count = 512
    """Longest answer in tokens."""
    temperature: Positive = 1.0
    engine: Literal["transformers", "vllm"] = "transformers"
    """Who samples: the policy itself, or a copy of it that vLLM runs in this process."""
    engine_cache_gib: Positive = 4.0
    """Memory for keys and values of the engine "vllm"."""
    num_epochs: Count = 1
    """Passes over the answers of one iteration."""
    num_minibatches: Count = 1
    """Optimiser steps per pass."""
    target_kl: NonNegative = 0.0
    """Leave out an iteration's passes that are left once one had a mean approx_kl above it; 0: none is left out."""
    clip_low: Share = 0.2
    clip_high: NonNegative = 0.2
    """PPO keeps the probability ratio in [1 - clip_low, 1 + clip_high]."""
    entropy_coef: NonNegative = 0.0
    """Weight of the policy's entropy in the objective."""
    anneal: str = ""
    """Which of kl_coef, entropy_coef, clip_low and clip_high fall to 0 in a straight line over the iterations:
    "clip_low,clip_high"."""
    top_entropy: Share = 1.0
    """Share of the tokens whose advantage counts, those of the highest entropy (arXiv 2506.01939)."""
    importance: Importance = "none"
    """Weigh each token by its probability over that of sampling, or by its answer's, truncated at max_importance or
    left out above it; "none": sampling's probabilities are PPO's old ones."""
    max_importance: Positive = 2.0
    loss_mode: str = "token-mean"
    """How token losses are averaged: a mode of `loss_weights`."""
    lr: NonNegative = 1e-6
    """Peak learning rate."""
    critic_lr: NonNegative = 1e-5
    warmup_iterations: CountOrNone = 0
    """Iterations over which the learning rate rises."""
    decay: Share = 0.0
    """Share of the iterations, at the end, over which the learning rate falls to 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped: CountOrNone = 3
    """Optimiser steps in a row that may be skipped because their gradient is not finite; one more ends the run."""
    max_tokens: CountOrNone = 0
    """Packed tokens per micro-batch; 0: 8192, on a CPU 2048, or as many as the longest answer has with its prompt."""
    recompute: bool = False
    """Layers keep their input alone for the backward pass and are computed again in it: activation checkpointing."""
    peak_tflops: NonNegative = 0.0
    """What one device can compute at most, dense and in `dtype`, by its data sheet: MFU is reported over it; 0: not."""

    eval_every: Count = 10
    """Iterations between evaluations; the first and the last are always evaluated."""
    eval_samples: Count = 1
    """Answers sampled to each evaluation prompt, beside the greedy one."""


def check(config: Config) -> None:
    """Raise ValueError for a number out of range, an unknown mode or verifier, and options that do not go together."""
    check_ranges(config)
    find_verifier(config.verifier)
    if config.engine == "vllm" and ranks.num_ranks() > 1:
        raise ValueError(f'the engine "vllm" runs in one process, got {ranks.num_ranks()}')
    if config.loss_mode not in MODES:
        raise ValueError(f"loss_mode must be one of {', '.join(MODES)}, got {config.loss_mode}")
    streams = parse_streams(config.reward)
    for stream, name, model in (
        ("q-rm", "q_rm", "Q-RM"),
        ("qrm-vocab", "q_rm", "Q-RM"),
        ("pure", "prm", "PRM"),
        ("orm", "orm", "ORM"),
        ("implicit", "implicit", "implicit reward model"),
    ):
        starts_as_policy = name == "implicit" and config.implicit_lr > 0
        if stream in streams and getattr(config, name) is None and not starts_as_policy:
            raise ValueError(f'reward "{stream}" needs {name}, the directory of a trained {model}, got None')
    if {"q-rm", "qrm-vocab"} <= streams.keys():
        raise ValueError(f"reward must name one kind of Q-RM, for there is one q_rm, got {config.reward}")
    if config.labelled_share < 1 and ("verifier" not in streams or len(streams) == 1):
        raise ValueError(f"labelled_share is for a mixture with the verifier, expected 1, got {config.labelled_share}")
    if config.implicit_lr and not {"implicit", "verifier"} <= streams.keys():
        raise ValueError(
            'implicit_lr fits the reward "implicit" to what the reward "verifier" says, expected both in reward, got '
            f'"{config.reward}"'
        )
    scored = [name for name in TOKEN_SCORES if name in streams]
    tokenwise = scored or "pure" in streams or config.estimator == "gae"
    if not tokenwise and config.kl_coef and config.kl_in == "reward":
        raise ValueError('kl_in "reward" needs token rewards, expected kl_in "loss" with reward "verifier"')
    if config.value_coef and (len(scored) != 1 or config.estimator != "own" or config.implicit_lr):
        raise ValueError(
            'value_coef needs the token scores of one model that stays and estimator "own", expected 0 with reward '
            f'"{config.reward}", got {config.value_coef}'
        )
    if config.overlong_tokens and ("verifier" not in streams or "pure" in streams):
        raise ValueError(
            'overlong_tokens are for the reward "verifier" without "pure", which counts right answers, expected 0 with '
            f'"{config.reward}", got {config.overlong_tokens}'
        )
    if config.overlong_tokens > config.max_new_tokens:
        raise ValueError(
            f"overlong_tokens must be at most max_new_tokens, {config.max_new_tokens}, got {config.overlong_tokens}"
        )
    if not config.top_entropy:
        raise ValueError("top_entropy must leave some token, expected above 0, got 0")
    if config.target_kl and config.num_epochs == 1:
        raise ValueError(f"target_kl ends passes before num_epochs, expected 0 with 1 of them, got {config.target_kl}")
    parse_anneal(config)
    if config.adaptive_kl and not config.kl_coef:
        raise ValueError(f"adaptive_kl steers kl_coef from where it starts, expected one above 0, got {config.kl_coef}")
    returns = {"q-rm", "qrm-vocab", "random"} & streams.keys()
    if config.estimator == "gae" and returns:
        raise ValueError(f'estimator "gae" sums rewards, which {min(returns)} has none of, got "{config.reward}"')
    if config.estimator == "min-gae" and "pure" not in streams:
        raise ValueError(f'estimator "min-gae" is for the steps of the reward "pure", got "{config.reward}"')
    if config.kl_coef and config.kl_in == "loss" and config.kl_estimator == "abs":
        raise ValueError('kl_estimator "abs" exists in the reward only, expected k1, k2 or k3 with kl_in "loss"')


def token_budget(longest: int, config: Config) -> int:
    """Packed tokens per micro-batch, of answers of which the longest has so many with its prompt."""
    return config.max_tokens or max(CPU_TOKENS if config.device == "cpu" else GPU_TOKENS, longest)


def check_budget(longest: int, config: Config) -> None:
    """Raise ValueError where an answer of `longest` tokens with its prompt would fit no micro-batch."""
    if longest > token_budget(longest, config):
        raise ValueError(
            f"max_tokens must hold the longest prompt and max_new_tokens, {longest} tokens, got {config.max_tokens}"
        )


def parse_streams(reward: str) -> dict[str, float]:
    """The kinds of reward in `reward`, "pure" or "pure=1.0,verifier=0.5", and their weights.

    Raises ValueError for an unknown kind, one that is given twice, and a weight that is not a positive number.
    """
    streams: dict[str, float] = {}
    for part in reward.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in STREAMS:
            raise ValueError(
                f"reward must be one of {', '.join(STREAMS)}, or a mixture such as {MIXTURE}, got {reward}"
            )
        if name in streams:
            raise ValueError(f"reward must name each kind once, got {reward}")
        try:
            streams[name] = float(weight) if "=" in part else 1.0
        except ValueError:
            streams[name] = math.nan
        if not 0 < streams[name] < math.inf:
            raise ValueError(f"the weight of {name} must be a positive number, got {weight} in {reward}")
    return streams


def parse_anneal(config: Config) -> list[str]:
    """The options that `config.anneal` names.

    Raises ValueError for one that cannot be annealed, that is 0 already, and for a kl_coef that adaptive_kl steers.
    """
    names = [name.strip() for name in config.anneal.split(",") if name.strip()]
    for name in names:
        if name not in ANNEALED:
            raise ValueError(f"anneal must name some of {', '.join(ANNEALED)}, got {config.anneal}")
        if not getattr(config, name) or (name == "kl_coef" and config.adaptive_kl):
            why = "which is 0" if not getattr(config, name) else "which adaptive_kl steers"
            raise ValueError(f"anneal must name options that are above 0 and free to fall, got {name}, {why}")
    return names
