"""Reinforcement learning of a policy, top to bottom: REINFORCE or PPO, credited token by token by a Q-RM
(arXiv 2505.23363) or answer by answer by a verifier.

Prompts, rollout, pack, score, credit, update, evaluate. Sequences are packed, never padded; no [T, V] tensor exists in
a scoring or training forward; the log-probabilities of sampling are the old ones of PPO's ratio, so there is no pass
to recompute them.
"""

import os
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import (
    PackedBatch,
    TokenLogprobs,
    group_advantages,
    loss_weights,
    pack,
    per_token,
    plan_microbatches,
    policy_loss,
    q_token_rewards,
    token_q,
    whiten,
)
from ..ops.checks import check_at_least_one
from ..ops.loss_weights import MODES
from .attention import check_no_leak, packed_hidden
from .data import Example, Prompt, read_jsonl
from .metrics import MetricsLog, Phases
from .models import Dtype, check_context, load_policy, load_q_rm, load_token_model, save_checkpoint
from .optimizer import AdamW, trapezoid
from .policy import policy_head
from .rewards import q_scores, verified
from .rollout import Engine, Rollout, TransformersEngine
from .tokenizers import check_same_vocabulary, encode_prompt, load_tokenizer
from .verifiers import find_verifier

# What a preset fixes, per algorithm; a field given in the configuration wins. The Q-RM presets are the released code
# and the paper's Algorithm 1; rloo (arXiv 2402.14740) on a verifier is their control.
_RELEASED = dict(reward="q-rm", center=False, eos_rescore="none", kl_estimator="abs", kl_in="reward")
_PAPER = dict(reward="q-rm", center=True, eos_rescore="none", kl_estimator="k1", kl_in="reward")
_RLOO = dict(reward="verifier", center=False, eos_rescore="none", kl_estimator="k3", kl_in="loss")
PRESETS = {
    ("qrm-released", "reinforce"): _RELEASED | dict(eos_rescore="mean", kl_coef=0.0, value_coef=0.0),
    ("qrm-released", "ppo"): _RELEASED | dict(kl_coef=0.01, value_coef=0.01, value_normalize=True),
    ("qrm-paper", "reinforce"): _PAPER | dict(kl_coef=0.0, value_coef=0.0),
    ("qrm-paper", "ppo"): _PAPER | dict(kl_coef=0.01, value_coef=1.0, value_normalize=False),
    ("rloo", "reinforce"): _RLOO | dict(kl_coef=0.0, value_coef=0.0),
    ("rloo", "ppo"): _RLOO | dict(kl_coef=0.0, value_coef=0.0),
}

# What a resumed run may change; all else shapes the run that the checkpoint belongs to.
RESUMABLE = {"out", "resume", "num_iterations", "max_tokens", "device", "tensorboard"}
RESUMABLE |= {"save_every", "eval_every", "eval_data"}


@dataclass
class Config:
    model: str
    """The policy to start from: Hugging Face id or directory."""
    data: str
    """JSONL file of prompts: {"instruction"}, and {"label"} for the reward "verifier"."""
    out: str
    """Directory for checkpoints and metrics.jsonl."""
    q_rm: str | None = None
    """Directory or id of the Q-RM; needed where the reward is "q-rm"."""
    eval_data: str | None = None
    """JSONL file of prompts with labels, on which Pass@1 is measured."""
    verifier: str = "number"
    """Who judges answers, in evaluation and for the reward "verifier": "number" or "arithmetic"."""
    preset: str = "qrm-released"
    """qrm-released, qrm-paper or rloo: the values of every field below whose default is None."""
    algorithm: Literal["reinforce", "ppo"] = "reinforce"

    reward: Literal["q-rm", "verifier", "random"] | None = None
    """Token scores of the Q-RM, answers judged by the verifier, or one normal draw per answer (a control)."""
    center: bool | None = None
    """Subtract the mean of the token scores before they are scaled."""
    scope: Literal["batch", "sequence", "group"] = "batch"
    """Over which tokens that mean and the scale are taken; a group is the answers to one prompt."""
    eos_rescore: Literal["none", "mean"] | None = None
    """Give the last token of an answer the mean score of its tokens."""
    min_std_share: float = 0.5
    """Lower bound of the scale, as a share of the first iteration's: a satisfied Q-RM must not amplify noise."""
    baseline: Literal["rloo", "grpo"] = "rloo"
    """Baseline of the reward "verifier" among the answers to one prompt."""
    kl_coef: float | None = None
    """Weight of the distance to the starting policy; 0: no reference model."""
    kl_estimator: Literal["abs", "k1", "k2", "k3"] | None = None
    """The distance, from the two log-probabilities of a token; "abs" exists in the reward only."""
    kl_in: Literal["reward", "loss"] | None = None
    """Taken off the token rewards once, or added to the loss at every update."""
    value_coef: float | None = None
    """Weight of a critic's value in the advantage; 0: no critic."""
    value_normalize: bool | None = None
    """Divide the values by their standard deviation first."""

    num_iterations: int = 100
    num_prompts: int = 128
    """Prompts per iteration."""
    group_size: int = 4
    """Answers sampled to each prompt."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 1.0
    num_epochs: int = 1
    """Passes over the answers of one iteration."""
    num_minibatches: int = 1
    """Optimiser steps per pass."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """PPO keeps the probability ratio in [1 - clip_low, 1 + clip_high]."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy in the objective."""
    loss_mode: str = "token-mean"
    """How token losses are averaged: a mode of `loss_weights`."""
    lr: float = 1e-6
    """Peak learning rate."""
    critic_lr: float = 1e-5
    warmup_iterations: int = 0
    """Iterations over which the learning rate rises."""
    decay: float = 0.0
    """Share of the iterations, at the end, over which the learning rate falls to 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_tokens: int = 8192
    """Packed tokens per micro-batch."""

    eval_every: int = 10
    """Iterations between evaluations; the first and the last are always evaluated."""
    eval_samples: int = 1
    """Answers sampled to each evaluation prompt, beside the greedy one."""
    save_every: int = 0
    """Iterations between resumable checkpoints; 0: none."""
    resume: bool = False
    """Go on from the last resumable checkpoint in `out`."""
    seed: int = 0
    device: str = "cpu"
    dtype: Dtype = "float32"
    tensorboard: bool = False
    """Write TensorBoard event files beside metrics.jsonl."""


class PassAt1(NamedTuple):
    greedy: float
    sampled: float


class TrainResult(NamedTuple):
    directory: str  # the policy's checkpoint
    before: PassAt1 | None  # None without eval_data
    after: PassAt1 | None
    metrics: list[dict[str, float]]  # the rows of metrics.jsonl


def resolve(config: Config) -> Config:
    """The configuration with every None that the preset speaks for filled in.

    Raises ValueError for an unknown preset, algorithm or mode, a number out of range, a missing Q-RM and a KL that
    neither reward nor loss can take.
    """
    if (config.preset, config.algorithm) not in PRESETS:
        presets, algorithms = (", ".join(dict.fromkeys(names)) for names in zip(*PRESETS, strict=True))
        got = f"{config.preset} and {config.algorithm}"
        raise ValueError(f"preset must be one of {presets} and algorithm one of {algorithms}, got {got}")
    preset = PRESETS[config.preset, config.algorithm]
    config = replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})
    if config.reward == "q-rm" and config.q_rm is None:
        raise ValueError('reward "q-rm" needs q_rm, the directory of a trained Q-RM, got None')
    if config.reward == "verifier" and config.kl_coef and config.kl_in == "reward":
        raise ValueError('kl_in "reward" needs token rewards, expected kl_in "loss" with reward "verifier"')
    if config.kl_coef and config.kl_in == "loss" and config.kl_estimator == "abs":
        raise ValueError('kl_estimator "abs" exists in the reward only, expected k1, k2 or k3 with kl_in "loss"')
    if config.loss_mode not in MODES:
        raise ValueError(f"loss_mode must be one of {', '.join(MODES)}, got {config.loss_mode}")
    find_verifier(config.verifier)
    check_at_least_one(config, "num_iterations", "num_prompts", "group_size", "max_new_tokens", "num_epochs")
    check_at_least_one(config, "num_minibatches", "eval_every", "eval_samples")
    if not config.temperature > 0:
        raise ValueError(f"temperature must be positive, got {config.temperature}")
    return config


def train(config: Config) -> TrainResult:
    """Run the loop of `config`. Same config, same bits, also through a resumed checkpoint.

    Raises ValueError for an unknown preset or option, malformed data, policy and Q-RM of different vocabularies, a
    Q-RM without a trained head, an answer longer than max_tokens or than a model's context, and a checkpoint of
    another configuration; RuntimeError where packed sequences are not independent.
    """
    config = resolve(config)
    reward_kl = config.kl_coef if config.kl_in == "reward" else 0.0
    loss_kl = config.kl_coef if config.kl_in == "loss" else 0.0
    torch.manual_seed(config.seed)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    dtype = getattr(torch, config.dtype)

    tokenizer = load_tokenizer(config.model)
    examples = read_jsonl(config.data, Example if config.reward == "verifier" else Prompt)
    eval_examples = read_jsonl(config.eval_data, Example) if config.eval_data else []
    longest, longest_eval = (
        max((len(encode_prompt(tokenizer, row.instruction)) for row in rows), default=0) + config.max_new_tokens
        for rows in (examples, eval_examples)
    )
    if longest > config.max_tokens:
        raise ValueError(
            f"max_tokens must hold the longest prompt and max_new_tokens, {longest} tokens, got {config.max_tokens}"
        )
    policy = load_policy(config.model, tokenizer, device=config.device, dtype=dtype)
    models = [policy]
    q_rm = reference = critic = critic_optimizer = None
    if config.reward == "q-rm":
        check_same_vocabulary(tokenizer, load_tokenizer(config.q_rm))
        q_rm = load_q_rm(config.q_rm, tokenizer, device=config.device, dtype=dtype)
        models.append(q_rm)
    if config.kl_coef:
        reference = load_policy(config.model, tokenizer, device=config.device, dtype=dtype).requires_grad_(False)
        models.append(reference)
    if config.value_coef:
        # The critic starts as the Q-RM (or the policy's backbone) with a new head.
        critic = load_token_model(config.q_rm or config.model, tokenizer, device=config.device, dtype=dtype)
        critic.score.reset_parameters()
        critic_optimizer = AdamW(critic.parameters())
        models.append(critic)
        critic.train()
    for model in models:
        check_no_leak(model)
        check_context(model, max(longest, longest_eval) if model is policy else longest)
    policy.train()
    optimizer = AdamW(policy.parameters())
    engine: Engine = TransformersEngine(policy, tokenizer.eos_token_id)
    order = prompt_order(len(examples), config)

    first_iteration, min_std = 0, 0.0
    state_path = Path(config.out) / "state.pt"
    if config.resume:
        state = torch.load(state_path)
        check_resumable(config, state["config"])
        first_iteration, min_std = state["iteration"], state["min_std"]
        generator.set_state(state["generator"])
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        if critic is not None:
            critic.load_state_dict(state["critic"])
            critic_optimizer.load_state_dict(state["critic_optimizer"])
    first_step = first_iteration + 1 if first_iteration else 0
    log = MetricsLog(config.out, first_step=first_step, tensorboard=config.tensorboard)
    phases = Phases(policy.device)

    def evaluation() -> dict[str, float]:
        with phases("evaluate"):
            result = evaluate(engine, tokenizer, eval_examples, config)
        return {f"eval/pass@1_{name}": value for name, value in result._asdict().items()}

    before = evaluation() if eval_examples and not first_iteration else {}
    if before:
        log(0, {**before, **phases.report()})

    for iteration in range(first_iteration, config.num_iterations):
        # ---- rollout: group_size answers to each prompt, with the log-probabilities they were sampled with
        chosen = [examples[i] for i in order[iteration] for _ in range(config.group_size)]
        prompts = [encode_prompt(tokenizer, example.instruction) for example in chosen]
        group_ids = torch.arange(len(prompts), device=config.device) // config.group_size  # [S]
        with phases("rollout"):
            rollout = engine.generate(
                prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature, generator=generator
            )
        num_answers, num_actions = len(prompts), sum(map(len, rollout.responses))
        phases.count("rollout", num_actions)
        stats = {"response/length": num_actions / num_answers, "response/finished": sum(rollout.finished) / num_answers}

        # ---- rewards of whole answers; one on which nothing would act is not even packed
        kept = list(range(num_answers))
        if config.reward == "verifier":
            labels = [example.label for example in chosen]
            rewards = verified(config.verifier, tokenizer, rollout.responses, rollout.finished, labels)  # [S]
            sequence_advantages = group_advantages(rewards.to(config.device), group_ids, kind=config.baseline)  # [S]
            if not loss_kl and not config.entropy_coef:
                kept = sequence_advantages.nonzero()[:, 0].tolist() or [0]
            stats["reward/mean"] = rewards.mean().item()

        # ---- pack: answers in the order of the micro-batches, so that one's actions are neighbours among the T rows
        with phases("pack"):
            lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, rollout.responses, strict=True)]
            minibatches = plan(kept, lengths, config, generator)
            batches = [pack_answers(m, prompts, rollout, config.device) for minibatch in minibatches for m in minibatch]
            kept = [s for minibatch in minibatches for microbatch in minibatch for s in microbatch]
            rows = [len(batch.action_index) for batch in batches]
            old_logprobs = torch.cat([rollout.logprobs[s] for s in kept])  # [T]
            cu_seqlens = torch.tensor([0, *(len(rollout.responses[s]) for s in kept)], device=config.device).cumsum(0)
            group_ids = group_ids[kept]

        # ---- score
        with phases("score"), torch.no_grad():
            ref_logprobs = values = None
            if reference is not None:
                ref_logprobs = torch.cat([logprobs_of(reference, batch, config).logprobs for batch in batches])  # [T]
            if critic is not None:
                values = torch.cat([values_of(critic, batch) for batch in batches])  # [T]
            if q_rm is not None:
                q = torch.cat([q_scores(q_rm, batch) for batch in batches])  # [T]
                phases.count("score", sum(lengths[s] for s in kept))
            elif config.reward == "random":
                q = per_token(torch.randn(len(kept), generator=generator, device=config.device), cu_seqlens, sum(rows))

        # ---- credit
        with phases("credit"):
            if config.reward == "verifier":
                advantages = returns = per_token(sequence_advantages[kept], cu_seqlens, sum(rows))  # [T]
            else:
                if iteration == 0:
                    min_std = config.min_std_share * q.std(correction=0).item()
                returns = q_token_rewards(
                    q,
                    cu_seqlens,
                    center=config.center,
                    scope=config.scope,
                    group_ids=group_ids if config.scope == "group" else None,
                    eos_rescore=config.eos_rescore,
                    kl_coef=reward_kl,
                    kl_estimator=config.kl_estimator,
                    logprobs=old_logprobs if reward_kl else None,
                    ref_logprobs=ref_logprobs if reward_kl else None,
                    min_std=min_std,
                )  # [T]
                advantages = returns
            if critic is not None:
                # A_t = r_t - c V_t: a Q-value is a return already, there is nothing left to discount or to sum
                baseline = whiten(values, center=False) if config.value_normalize else values
                advantages = returns - config.value_coef * baseline

        # ---- update: a loss is divided by its mini-batch's even share of all counts, so micro-batches add up exactly
        with phases("update"):
            lr_share = trapezoid(iteration, config.num_iterations, warmup=config.warmup_iterations, decay=config.decay)
            columns = [advantages, returns, old_logprobs, *([] if ref_logprobs is None else [ref_logprobs])]
            microbatches = zip(batches, *(column.split(rows) for column in columns), strict=True)
            updates = [list(islice(microbatches, len(minibatch))) for minibatch in minibatches]
            sums, ratio_max = [], []
            for _ in range(config.num_epochs):
                for update in updates:
                    for batch, A, _, old, *ref in update:
                        logprobs, entropy, _ = logprobs_of(policy, batch, config)  # [T_m]
                        weights = weights_of(batch, num_answers, num_actions, len(updates), config)  # [T_m]
                        loss, _, _, metrics = policy_loss(
                            logprobs,
                            A,
                            entropy=entropy,
                            old_logprobs=old,
                            ref_logprobs=ref[0] if ref else None,
                            token_weights=weights,
                            kind=config.algorithm,
                            clip_low=config.clip_low,
                            clip_high=config.clip_high,
                            kl_coef=loss_kl,
                            kl_estimator=config.kl_estimator if loss_kl else "k3",
                            entropy_coef=config.entropy_coef,
                        )
                        loss.backward()
                        *additive, largest = metrics
                        sums.append(torch.stack([loss.detach(), weights.sum(), *additive]))
                        ratio_max.append(largest)
                    grad_norm = optimizer.step(config.lr * lr_share, config.max_grad_norm)
                    if critic is None:
                        continue
                    for batch, _, R, *_ in update:
                        weights = weights_of(batch, num_answers, num_actions, len(updates), config)
                        (weights * (values_of(critic, batch) - R) ** 2).sum().backward()
                    critic_optimizer.step(config.critic_lr * lr_share, config.max_grad_norm)
            engine.update(policy)
        phases.count("update", sum(lengths[s] for s in kept) * config.num_epochs)

        # ---- report; this is where the step waits for the device
        if config.reward != "verifier":
            stats |= {"reward/q_mean": q.mean(), "reward/q_std": q.std(correction=0)}
        stats |= {"advantage/mean": advantages.mean(), "advantage/std": advantages.std(correction=0)}
        # The loss of an update, averaged over updates; weighted means over the tokens that were trained on.
        loss, total_weight, *totals = torch.stack(sums).sum(0)
        names = ("clipfrac_low", "clipfrac_high", "approx_kl", "ref_kl", "ratio", "entropy")
        stats["policy/loss"] = loss / (config.num_epochs * len(updates))
        stats |= {f"policy/{name}": total / total_weight for name, total in zip(names, totals, strict=True)}
        stats |= {"policy/ratio_max": torch.stack(ratio_max).max(), "policy/grad_norm": grad_norm}
        values = torch.stack([torch.as_tensor(x, device=policy.device) for x in stats.values()]).tolist()
        row = dict(zip(stats, values, strict=True))
        row["policy/lr"] = config.lr * lr_share
        if eval_examples and ((iteration + 1) % config.eval_every == 0 or iteration + 1 == config.num_iterations):
            row |= evaluation()
        log(iteration + 1, row | phases.report())

        if config.save_every and (iteration + 1) % config.save_every == 0:
            state = {
                "config": asdict(config),
                "iteration": iteration + 1,
                "min_std": min_std,
                "generator": generator.get_state(),
                "policy": policy.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            if critic is not None:
                state |= {"critic": critic.state_dict(), "critic_optimizer": critic_optimizer.state_dict()}
            torch.save(state, state_path.with_suffix(".new"))
            os.replace(state_path.with_suffix(".new"), state_path)  # a crash leaves the old checkpoint or the new one

    save_checkpoint(policy, tokenizer, config.out)
    rows = [row for row in log.rows if "eval/pass@1_greedy" in row]
    passes = [PassAt1(row["eval/pass@1_greedy"], row["eval/pass@1_sampled"]) for row in rows] or [None]
    return TrainResult(config.out, passes[0], passes[-1], log.rows)


def check_resumable(config: Config, saved: dict) -> None:
    """Raise ValueError where `config` would go on with another run than the one that `saved` began."""
    for name, value in asdict(config).items():
        if name not in RESUMABLE and value != saved[name]:
            raise ValueError(f"{name} must be that of the checkpoint, {saved[name]!r}, got {value!r}")


def evaluate(engine: Engine, tokenizer: PreTrainedTokenizerBase, examples: list[Example], config: Config) -> PassAt1:
    """Share of right answers over `examples`: greedy, and the mean over `eval_samples` answers at temperature 1.

    The samples of one policy are the same at every call: their generator starts from the seed.
    """
    prompts = [encode_prompt(tokenizer, example.instruction) for example in examples]
    labels = [example.label for example in examples]
    generator = torch.Generator(config.device).manual_seed(config.seed)

    def share_right(num_samples: int, temperature: float) -> float:
        rollout = engine.generate(
            prompts * num_samples, max_new_tokens=config.max_new_tokens, temperature=temperature, generator=generator
        )
        right = verified(config.verifier, tokenizer, rollout.responses, rollout.finished, labels * num_samples)
        return right.mean().item()

    return PassAt1(greedy=share_right(1, 0.0), sampled=share_right(config.eval_samples, 1.0))


def prompt_order(num_examples: int, config: Config) -> list[list[int]]:
    """The prompts of every iteration: passes over the data, each in a new order."""
    generator = torch.Generator().manual_seed(config.seed)
    num_passes = -(-config.num_iterations * config.num_prompts // num_examples)
    passes = torch.cat([torch.randperm(num_examples, generator=generator) for _ in range(num_passes)])
    return [x.tolist() for x in passes.split(config.num_prompts)[: config.num_iterations]]


def plan(kept: list[int], lengths: list[int], config: Config, generator: torch.Generator) -> list[list[list[int]]]:
    """Answers by mini-batch and micro-batch: mini-batches at random, micro-batches within max_tokens."""
    order = torch.tensor(kept)
    if config.num_minibatches > 1:
        order = order[torch.randperm(len(kept), generator=generator, device=generator.device).cpu()]
    minibatches = []
    for part in (x.tolist() for x in order.tensor_split(config.num_minibatches) if len(x)):
        microbatches = plan_microbatches([lengths[s] for s in part], max_tokens=config.max_tokens)[0]
        # sorted, because packed attention takes equally long neighbours in one call
        minibatches.append([sorted((part[i] for i in m), key=lengths.__getitem__) for m in microbatches])
    return minibatches


def pack_answers(answers: list[int], prompts: list[list[int]], rollout: Rollout, device: str) -> PackedBatch:
    sequences = [prompts[s] + rollout.responses[s] for s in answers]
    return pack(sequences, [len(prompts[s]) for s in answers], device=device)


def logprobs_of(policy: PreTrainedModel, batch: PackedBatch, config: Config) -> TokenLogprobs:
    """Log-probability and entropy [T] of every action, read where the policy predicts it."""
    hidden = packed_hidden(policy, batch)[batch.action_index]  # [T, D]
    targets = batch.targets[batch.action_index]
    return policy_head(policy).logprobs(hidden, targets, temperature=config.temperature)


def values_of(critic: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """V(s_t) [T] of the state before every action."""
    hidden = packed_hidden(critic, batch)[batch.action_index]  # [T, D]
    return token_q(hidden, critic.score.weight, bias=critic.score.bias)


def weights_of(batch: PackedBatch, num_answers: int, num_actions: int, num_updates: int, config: Config) -> Tensor:
    """Weight [T] of every action in the loss of its mini-batch, one of `num_updates` that share all counts evenly."""
    return loss_weights(
        batch.action_cu_seqlens,
        mode=config.loss_mode,
        global_tokens=num_actions / num_updates,
        global_sequences=num_answers / num_updates,
        norm=config.max_new_tokens if config.loss_mode == "seq-mean-token-sum-norm" else None,
        num_tokens=len(batch.action_index),
    )
