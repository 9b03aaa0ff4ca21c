"""The streams that a configuration names, side by side."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ... import gae
from ...ops.gae import Advantages
from ..config import TOKEN_SCORES, Config, parse_streams
from ..data import Example, Prompt
from ..lora import adapted
from ..models import load_implicit, load_policy, load_prm, load_q_rm, load_vocabulary_q, num_token_ids
from ..policy import Policy
from ..rollout import Rollout
from ..scorer import StepScorer, TokenScorer, VocabularyScorer
from ..tokenizers import check_same_vocabulary, load_tokenizer
from .credit import Packed, Stream, penalty
from .oracle import ArithmeticPRM
from .prime import Prime
from .process import Process
from .q_rm import QRM, Implicit, Outcome, Random, VocabularyQ
from .verifier import Verifier


class Weighted:
    """Streams side by side, each over its own baseline: A = sum of w A_stream. Or one critic over all their rewards."""

    def __init__(self, streams: dict[str, tuple[float, Stream]], config: Config) -> None:
        self.streams, self.config = streams, config
        self.models = [model for _, stream in streams.values() for model in stream.models]

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> Tensor | None:
        parts = []
        for weight, stream in self.streams.values():
            advantages = stream.of_answers(rollout, examples, group_ids)
            parts.append(None if advantages is None else weight * advantages)
        known = [part for part in parts if part is not None]
        return torch.stack(known).sum(0) if len(known) == len(parts) and self.config.estimator != "gae" else None

    def of_tokens(self, packed: Packed) -> Advantages:
        config = self.config
        if config.estimator == "gae":
            assert packed.values is not None  # there is a critic
            rewards = torch.stack([weight * x.rewards_of_tokens(packed) for weight, x in self.streams.values()]).sum(0)
            kl = penalty(packed, config)
            rewards = rewards if kl is None else rewards - kl
            return gae(rewards, packed.values, packed.cu_seqlens, gamma=config.gamma, lam=config.lam)
        parts = {name: stream.of_tokens(packed) for name, (_, stream) in self.streams.items()}
        weights = [weight for weight, _ in self.streams.values()]
        advantages = torch.stack([w * part.advantages for w, part in zip(weights, parts.values(), strict=True)]).sum(0)
        with_critic = ("pure",) if config.estimator == "min-gae" else TOKEN_SCORES
        valued = next((parts[name] for name in with_critic if name in parts), next(iter(parts.values())))
        return Advantages(advantages, valued.returns)  # what the critic is of, where there is one

    def metrics(self) -> dict[str, Tensor]:
        """Of each stream. What several of them report is named after its stream, too: reward/orm/q_mean."""
        reported = {name: stream.metrics() for name, (_, stream) in self.streams.items()}
        times = Counter(key for of_stream in reported.values() for key in of_stream)
        return {
            key if times[key] == 1 else key.replace("/", f"/{name}/"): x
            for name, of_stream in reported.items()
            for key, x in of_stream.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: stream.state_dict() for name, (_, stream) in self.streams.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, (_, stream) in self.streams.items():
            stream.load_state_dict(state[name])


def load_credit(config: Config, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> Weighted:
    """The streams that `config.reward` names, with their models.

    Raises ValueError for a reward model of another vocabulary than `tokenizer`'s, or of another kind than is asked for.
    """
    weights = parse_streams(config.reward)
    options: dict[str, Any] = dict(device=config.device, dtype=getattr(torch, config.dtype))
    taker = next((name for name in ("pure", *TOKEN_SCORES) if name in weights), "")

    def checked(spec: str | None) -> str:
        assert spec is not None  # `check` refuses it
        check_same_vocabulary(tokenizer, load_tokenizer(spec))
        return spec

    def token_scores(name: str) -> QRM:
        # taken off the reward once, by the first that can
        kl_coef = config.kl_coef / weights[name] if config.kl_in == "reward" and name == taker else 0.0
        if name == "random":
            return Random(config, kl_coef)
        if name == "qrm-vocab":
            q_model = load_vocabulary_q(checked(config.q_rm), tokenizer, **options)
            return VocabularyQ(VocabularyScorer(q_model), policy, config, kl_coef)
        if name == "implicit":
            return implicit(kl_coef)
        if name == "orm":
            model = load_q_rm(checked(config.orm), tokenizer, kind="orm", **options)
            return Outcome(TokenScorer(model, reads_action=True), config, kl_coef)
        model = load_q_rm(checked(config.q_rm), tokenizer, **options)
        return QRM(TokenScorer(model, reads_action=True), config, kl_coef)

    def implicit(kl_coef: float) -> Implicit:
        if config.implicit is None:  # it learns, and starts as the policy
            model, start = (load_policy(config.model, tokenizer, **options) for _ in range(2))
            beta = config.implicit_beta
        else:
            model, start, beta = load_implicit(checked(config.implicit), tokenizer, **options)
        num_ids = num_token_ids(tokenizer)
        reference = Policy(start.requires_grad_(False), num_ids=num_ids)
        if not config.implicit_lr:
            return Implicit(Policy(model, num_ids=num_ids), reference, beta, config, kl_coef)
        assert verifier is not None  # `check` refuses it
        model = adapted(model.requires_grad_(True), config.implicit or config.model, config)
        return Prime(Policy(model, num_ids=num_ids), reference, beta, config, kl_coef, verifier)

    verifier = Verifier(tokenizer, config) if "verifier" in weights else None
    streams: dict[str, tuple[float, Stream]] = {
        name: (weights[name], token_scores(name)) for name in TOKEN_SCORES if name in weights
    }
    if "pure" in weights:
        scorer: StepScorer | ArithmeticPRM
        if config.prm is not None and config.prm.partition(":")[0] == "arithmetic":
            scorer = ArithmeticPRM(config.prm, tokenizer, config.seed)
        else:
            scorer = StepScorer(load_prm(checked(config.prm), tokenizer, **options))
        share = weights.get("verifier", 0.0)
        streams["pure"] = 1.0, Process(scorer, tokenizer, config, weights["pure"], verifier, share)
    elif verifier is not None:
        streams["verifier"] = weights["verifier"], verifier
    return Weighted(streams, config)
