"""The streams that a configuration names, side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ... import gae
from ...ops.gae import Advantages
from ..config import Config, parse_streams
from ..data import Example, Prompt
from ..models import load_prm, load_q_rm
from ..rollout import Rollout
from ..scorer import StepScorer, TokenScorer
from ..tokenizers import check_same_vocabulary, load_tokenizer
from .credit import Packed, Stream, penalty
from .process import Process
from .q_rm import QRM, Random
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
        valued = parts.get("pure" if config.estimator == "min-gae" else "q-rm", next(iter(parts.values())))
        return Advantages(advantages, valued.returns)  # what the critic is of, where there is one

    def metrics(self) -> dict[str, Tensor]:
        return {name: x for _, stream in self.streams.values() for name, x in stream.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: stream.state_dict() for name, (_, stream) in self.streams.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, (_, stream) in self.streams.items():
            stream.load_state_dict(state[name])


def load_credit(config: Config, tokenizer: PreTrainedTokenizerBase) -> Weighted:
    """The streams that `config.reward` names, with their models.

    Raises ValueError for a reward model of another vocabulary than `tokenizer`'s, or without a trained head.
    """
    weights = parse_streams(config.reward)
    options: dict[str, Any] = dict(device=config.device, dtype=getattr(torch, config.dtype))
    kl_coefs = dict.fromkeys(weights, 0.0)
    if config.kl_in == "reward":  # taken off once, by the first of these
        taker = next((name for name in ("pure", "q-rm", "random") if name in weights), "")
        kl_coefs[taker] = config.kl_coef / weights.get(taker, 1.0)

    streams: dict[str, tuple[float, Stream]] = {}
    if "q-rm" in weights:
        assert config.q_rm is not None  # `check` refuses it
        check_same_vocabulary(tokenizer, load_tokenizer(config.q_rm))
        q_rm = load_q_rm(config.q_rm, tokenizer, **options)
        streams["q-rm"] = weights["q-rm"], QRM(TokenScorer(q_rm, reads_action=True), config, kl_coefs["q-rm"])
    if "random" in weights:
        streams["random"] = weights["random"], Random(config, kl_coefs["random"])
    verifier = Verifier(tokenizer, config) if "verifier" in weights else None
    if "pure" in weights:
        assert config.prm is not None  # `check` refuses it
        check_same_vocabulary(tokenizer, load_tokenizer(config.prm))
        scorer = StepScorer(load_prm(config.prm, tokenizer, **options))
        share = weights.get("verifier", 0.0)
        streams["pure"] = 1.0, Process(scorer, tokenizer, config, weights["pure"], verifier, share)
    elif verifier is not None:
        streams["verifier"] = weights["verifier"], verifier
    return Weighted(streams, config)
