"""The options of the loop: every field has a value; a preset is a set of values for those that tell methods apart."""

from dataclasses import dataclass
from typing import Any, Literal

from ..ops.loss_weights import MODES
from .ranges import Count, CountOrNone, NonNegative, Positive, Share, check_ranges
from .run_folder import RunOptions
from .verifiers import find_verifier

# What a preset sets, per algorithm; a field given beside it wins. The Q-RM presets are the released code and the
# paper's Algorithm 1 (arXiv 2505.23363); rloo (arXiv 2402.14740) on a verifier is their control.
_RELEASED = dict(reward="q-rm", center=False, eos_rescore="none", kl_estimator="abs", kl_in="reward")
_PAPER = dict(reward="q-rm", center=True, eos_rescore="none", kl_estimator="k1", kl_in="reward")
_RLOO = dict(reward="verifier", center=False, eos_rescore="none", kl_estimator="k3", kl_in="loss")
_NO_CRITIC = dict(kl_coef=0.0, value_coef=0.0, value_normalize=True)
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("qrm-released", "reinforce"): _RELEASED | _NO_CRITIC | dict(eos_rescore="mean"),
    ("qrm-released", "ppo"): _RELEASED | dict(kl_coef=0.01, value_coef=0.01, value_normalize=True),
    ("qrm-paper", "reinforce"): _PAPER | _NO_CRITIC,
    ("qrm-paper", "ppo"): _PAPER | dict(kl_coef=0.01, value_coef=1.0, value_normalize=False),
    ("rloo", "reinforce"): _RLOO | _NO_CRITIC,
    ("rloo", "ppo"): _RLOO | _NO_CRITIC,
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
    """The policy to start from: Hugging Face id or directory."""
    data: str
    """JSONL file of prompts: {"instruction"}, and {"label"} for the reward "verifier"."""
    q_rm: str | None = None
    """Directory or id of the Q-RM; needed where the reward is "q-rm"."""
    eval_data: str | None = None
    """JSONL file of prompts with labels, on which Pass@1 is measured."""
    verifier: str = "number"
    """Who judges answers, in evaluation and for the reward "verifier": "number", "math" or "arithmetic"."""
    algorithm: Literal["reinforce", "ppo"] = "reinforce"

    reward: Literal["q-rm", "verifier", "random"] = "q-rm"
    """Token scores of the Q-RM, answers judged by the verifier, or one normal draw per answer (a control)."""
    center: bool = False
    """Subtract the mean of the token scores before they are scaled."""
    scope: Literal["batch", "sequence", "group"] = "batch"
    """Over which tokens that mean and the scale are taken; a group is the answers to one prompt."""
    eos_rescore: Literal["none", "mean"] = "mean"
    """Give the last token of an answer the mean score of its tokens."""
    min_std_share: NonNegative = 0.5
    """Lower bound of the scale, as a share of the first iteration's: a satisfied Q-RM must not amplify noise."""
    baseline: Literal["rloo", "grpo"] = "rloo"
    """Baseline of the reward "verifier" among the answers to one prompt."""
    kl_coef: NonNegative = 0.0
    """Weight of the distance to the starting policy; 0: no reference model."""
    kl_estimator: Literal["abs", "k1", "k2", "k3"] = "abs"
    """The distance, from the two log-probabilities of a token; "abs" exists in the reward only."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Taken off the token rewards once, or added to the loss at every update."""
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
    num_epochs: Count = 1
    """Passes over the answers of one iteration."""
    num_minibatches: Count = 1
    """Optimiser steps per pass."""
    clip_low: Share = 0.2
    clip_high: NonNegative = 0.2
    """PPO keeps the probability ratio in [1 - clip_low, 1 + clip_high]."""
    entropy_coef: NonNegative = 0.0
    """Weight of the policy's entropy in the objective."""
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
    max_tokens: Count = 8192
    """Packed tokens per micro-batch."""

    eval_every: Count = 10
    """Iterations between evaluations; the first and the last are always evaluated."""
    eval_samples: Count = 1
    """Answers sampled to each evaluation prompt, beside the greedy one."""


def check(config: Config) -> None:
    """Raise ValueError for a number out of range, an unknown mode or verifier, and options that do not go together."""
    check_ranges(config)
    find_verifier(config.verifier)
    if config.loss_mode not in MODES:
        raise ValueError(f"loss_mode must be one of {', '.join(MODES)}, got {config.loss_mode}")
    if config.reward == "q-rm" and config.q_rm is None:
        raise ValueError('reward "q-rm" needs q_rm, the directory of a trained Q-RM, got None')
    if config.reward == "verifier" and config.kl_coef and config.kl_in == "reward":
        raise ValueError('kl_in "reward" needs token rewards, expected kl_in "loss" with reward "verifier"')
    if config.reward == "verifier" and config.value_coef:
        raise ValueError(f'value_coef needs token rewards, expected 0 with reward "verifier", got {config.value_coef}')
    if config.kl_coef and config.kl_in == "loss" and config.kl_estimator == "abs":
        raise ValueError('kl_estimator "abs" exists in the reward only, expected k1, k2 or k3 with kl_in "loss"')
