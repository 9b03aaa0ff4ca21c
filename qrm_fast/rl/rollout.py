"""Sampling: prompts to responses with the log-probabilities they were sampled with."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..packing import pack
from .attention import TOLERANCE, backbone, without_adapters
from .policy import Policy


class Rollout(NamedTuple):
    """Responses in the order of the prompts, those to one prompt next to each other."""

    responses: list[list[int]]  # token ids of each response, the stop id included where one was produced
    logprobs: list[Tensor]  # of each response [T_s] float32, the log-probability of each token as it was sampled
    finished: list[bool]  # whether each response ends with a stop id, False where max_new_tokens cut it


class Engine(Protocol):
    """What the loop asks of a generator, which may run in this process or in another."""

    def generate(
        self, prompts: list[list[int]], *, num_samples: int, max_new_tokens: int, temperature: float, seed: int
    ) -> Rollout:
        """`num_samples` responses to each prompt. Same arguments and weights, same tokens."""

    def sync(self, policy: Policy) -> None:
        """Sample from the weights of `policy` from now on."""


def check_rollout(rollout: Rollout, num_answers: int, max_new_tokens: int) -> None:
    """Raise ValueError where an engine gives something else than it was asked for. An empty answer is legal."""
    if not len(rollout.responses) == len(rollout.logprobs) == len(rollout.finished) == num_answers:
        raise ValueError(f"the engine must give {num_answers} answers, got {len(rollout.responses)}")
    for number, (response, logprobs) in enumerate(zip(rollout.responses, rollout.logprobs, strict=True)):
        if len(response) > max_new_tokens or logprobs.shape != (len(response),):
            raise ValueError(
                f"the engine must give at most {max_new_tokens} tokens and a log-probability of each, got "
                f"{len(response)} tokens and {list(logprobs.shape)} for answer {number}"
            )
    if not any(rollout.responses):
        raise ValueError(f"the engine must give some answer a token, got {num_answers} empty ones")


class TransformersEngine:
    """Samples from a transformers model in this process, with left-padded prompts and a key-value cache.

    Samples the whole vocabulary at the given temperature, without top-p or top-k, so that the returned
    log-probabilities are those of the distribution sampled from. A prompt is read once, whatever the number of its
    responses; some `max_rows` responses are generated at a time.
    """

    def __init__(self, policy: Policy, stop_ids: Sequence[int], *, max_rows: int = 512) -> None:
        self.stop_ids, self.max_rows = list(stop_ids), max_rows
        self.sync(policy)

    def sync(self, policy: Policy) -> None:
        self.policy, self.model = policy, without_adapters(policy.model)

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], *, num_samples: int = 1, max_new_tokens: int, temperature: float, seed: int
    ) -> Rollout:
        """Temperature 0 takes the argmax, with log-probability 0.

        Raises ValueError for no prompt, an empty prompt, a negative temperature, num_samples or max_new_tokens < 1,
        FloatingPointError for a model whose logits are not finite.
        """
        if not prompts or not all(prompts):
            raise ValueError("prompts must be non-empty lists of token ids, got no prompt or an empty one")
        if temperature < 0 or max_new_tokens < 1 or num_samples < 1:
            raise ValueError(
                "temperature must be >= 0, max_new_tokens and num_samples >= 1, got "
                f"{temperature}, {max_new_tokens} and {num_samples}"
            )
        generator = torch.Generator(self.model.device).manual_seed(seed)
        training = self.model.training
        self.model.eval()
        tokens: list[list[int]] = []
        logprobs: list[Tensor] = []
        num_prompts = max(1, self.max_rows // num_samples)
        try:
            for i in range(0, len(prompts), num_prompts):
                chunk = self._generate(
                    prompts[i : i + num_prompts], num_samples, max_new_tokens, temperature, generator
                )
                tokens += chunk[0].tolist()
                logprobs += [x[:n] for x, n in zip(*chunk[1:], strict=True)]
        finally:
            self.model.train(training)
        responses = [row[: len(logprob)] for row, logprob in zip(tokens, logprobs, strict=True)]
        if not torch.cat(logprobs).isfinite().all():
            raise FloatingPointError(
                f"sampling from {type(self.model).__name__} gave log-probabilities that are not finite"
            )
        finished = [response[-1] in self.stop_ids for response in responses]
        return Rollout(responses, logprobs, finished)

    def _generate(
        self,
        prompts: list[list[int]],
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Tokens and log-probabilities [R, max_new_tokens], and the length of each response."""
        device = self.model.device
        num_rows, width = len(prompts) * num_samples, max(map(len, prompts))
        padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # [B, P]
        position = torch.tensor([len(prompt) for prompt in prompts], device=device)  # of the next token, [B]
        # A left-padded row may look back at its own tokens only: `visible` [B, P + L] says which columns those are.
        columns = torch.arange(width + max_new_tokens, device=device)
        visible = columns >= width - position[:, None]
        causal = columns[:width] <= columns[:width, None]  # [P, P]
        diagonal = torch.eye(width, dtype=torch.bool, device=device)  # a padded query sees itself, or its row is NaN
        mask = (visible[:, None, :width] & causal | diagonal)[:, None]  # [B, 1, P, P]
        cache = Cache(
            layers=[RoomyLayer(len(columns)) for _ in range(self.model.config.get_text_config().num_hidden_layers)]
        )

        tokens = torch.zeros(num_rows, max_new_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(num_rows, max_new_tokens, device=device)
        lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        rows = torch.arange(num_rows, device=device)  # those in the cache, [R]
        alive = torch.ones_like(rows, dtype=torch.bool)  # [R]
        stop_ids = torch.tensor(self.stop_ids, device=device)
        hidden = self._hidden(padded, (columns[:width] - width + position[:, None]).clamp(min=0), mask, cache)[:, -1:]
        if num_samples > 1:
            hidden, position, visible = (x.repeat_interleave(num_samples, 0) for x in (hidden, position, visible))
            cache.batch_repeat_interleave(num_samples)
        for step in range(max_new_tokens):
            token, logprob = self._sample(hidden[:, -1], temperature, generator)  # [R], [R]
            tokens[rows, step], logprobs[rows, step] = token, logprob
            lengths[rows] += alive
            alive &= ~torch.isin(token, stop_ids)
            num_alive = int(alive.sum())
            if num_alive == 0 or step + 1 == max_new_tokens:
                break
            if num_alive <= 7 / 8 * len(rows):  # dropping rows copies the cache, keeping them computes for nothing
                kept = alive.nonzero()[:, 0]
                rows, alive, token, position, visible = (x[kept] for x in (rows, alive, token, position, visible))
                cache.batch_select_indices(kept)
            mask = visible[:, None, None, : width + step + 1]  # [R, 1, 1, P + step + 1]
            hidden = self._hidden(token[:, None], position[:, None], mask, cache)
            position = position + 1
        return tokens, logprobs, lengths.tolist()

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        return backbone(self.model)(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _sample(self, hidden: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        head = self.policy.head()
        if temperature == 0:
            logits = head.logits(hidden)  # [R, V]
            return logits.argmax(-1), torch.where(logits.isfinite().all(-1), 0.0, torch.nan)
        uniforms = torch.rand(len(hidden), generator=generator, dtype=torch.float64, device=hidden.device)
        return head.sample(hidden, uniforms, temperature=temperature)


@torch.no_grad()
def check_sampling(engine: Engine, policy: Policy, num_tokens: int) -> None:
    """Raise ValueError where `engine` samples from another distribution than the one that `policy` is trained on.

    Two prompts of different length are answered, up to `num_tokens` in all, the longest that will occur, and the
    log-probabilities of sampling compared with those of the packed forward.
    """
    num_new = min(4, num_tokens - 1)
    generator = torch.Generator().manual_seed(1)
    num_ids = len(policy.head().weight)
    lengths = (max(1, num_tokens - num_new), max(1, (num_tokens - num_new) // 3))
    prompts = [torch.randint(num_ids, (n,), generator=generator).tolist() for n in lengths]
    rollout = engine.generate(prompts, num_samples=2, max_new_tokens=num_new, temperature=1.0, seed=0)
    asked = [prompt for prompt in prompts for _ in range(2)]
    device = rollout.logprobs[0].device
    rows = [prompt + response for prompt, response in zip(asked, rollout.responses, strict=True)]
    trained = policy(pack(rows, list(map(len, asked)), device=device)).logprobs
    distance = ((torch.cat(rollout.logprobs) - trained).abs() / (1 + trained.abs())).max()
    if not distance <= TOLERANCE[policy.head().weight.dtype]:
        raise ValueError(
            f"{type(without_adapters(policy.model)).__name__} must be sampled from as it is trained, got "
            f"log-probabilities that differ by {distance:.2g} of their size"
        )


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in a buffer of its final length: DynamicLayer copies all of them at every token."""

    def __init__(self, max_len: int) -> None:
        super().__init__()
        self.max_len, self.num_tokens = max_len, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        num_rows, num_heads, _, head_dim = key_states.shape
        self.key_room = key_states.new_empty(num_rows, num_heads, self.max_len, head_dim)
        self.value_room = value_states.new_empty(num_rows, num_heads, self.max_len, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.num_tokens + key_states.shape[2]
        self.key_room[:, :, self.num_tokens : end] = key_states
        self.value_room[:, :, self.num_tokens : end] = value_states
        self.num_tokens = end
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.key_room, self.value_room = self.key_room[indices], self.value_room[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.key_room, self.value_room = (x.repeat_interleave(repeats, 0) for x in (self.key_room, self.value_room))
