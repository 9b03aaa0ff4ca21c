"""Sampling: prompts to responses with the log-probabilities they were sampled with."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from ..packing import pack
from .attention import TOLERANCE, backbone, packed_inputs, without_adapters
from .decoding import FixedStep, Step, can_be_fixed
from .policy import Policy
from .row_cache import Prefix, RowCache, prefixes

# Steps until the cache is moved to the beginning of its buffer.
SPARE_COLUMNS = 128


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


def check_request(prompts: list[list[int]], num_samples: int, max_new_tokens: int, temperature: float) -> None:
    """Raise ValueError where no engine could answer."""
    if not prompts or not all(prompts):
        raise ValueError("prompts must be non-empty lists of token ids, got no prompt or an empty one")
    if temperature < 0 or max_new_tokens < 1 or num_samples < 1:
        raise ValueError(
            "temperature must be >= 0, max_new_tokens and num_samples >= 1, got "
            f"{temperature}, {max_new_tokens} and {num_samples}"
        )


def check_finite_logprobs(logprobs: Tensor, policy: Policy) -> None:
    """Raise FloatingPointError where those of sampling are not."""
    if not logprobs.isfinite().all():
        name = type(without_adapters(policy.model)).__name__
        raise FloatingPointError(f"sampling from {name} gave log-probabilities that are not finite")


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


class Row(NamedTuple):
    """An answer that is being sampled."""

    answer: int
    start: int  # the first column of its prompt in the cache
    begin: int  # the first column of its own


class TransformersEngine:
    """Samples from a transformers model in this process, with a key-value cache.

    Samples the whole vocabulary at the given temperature, without top-p or top-k, so that the returned
    log-probabilities are those of the distribution sampled from. At most `max_rows` responses are generated at a time:
    as one ends, the next takes its row of the cache. A prompt is read once, whatever the number of its responses, and
    without padding. On CUDA steps have fixed shapes and are recorded as a graph; `fixed` says so elsewhere, too.
    """

    def __init__(
        self, policy: Policy, stop_ids: Sequence[int], *, max_rows: int = 512, fixed: bool | None = None
    ) -> None:
        self.stop_ids, self.max_rows = list(stop_ids), max_rows
        self.fixed = policy.model.device.type == "cuda" if fixed is None else fixed
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
        check_request(prompts, num_samples, max_new_tokens, temperature)
        generator = torch.Generator(self.model.device).manual_seed(seed)
        training = self.model.training
        self.model.eval()
        try:
            tokens, rows, lengths = self._generate(prompts, num_samples, max_new_tokens, temperature, generator)
        finally:
            self.model.train(training)
        responses = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        logprobs = [row[:n] for row, n in zip(rows, lengths, strict=True)]
        check_finite_logprobs(torch.cat(logprobs), self.policy)
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
        """Tokens and log-probabilities [A, max_new_tokens] of A answers, and their lengths."""
        device = self.model.device
        num_answers, width = len(prompts) * num_samples, max(map(len, prompts))
        num_rows = min(num_answers, self.max_rows)
        tokens = torch.zeros(
            num_answers + 1, max_new_tokens, dtype=torch.int64, device=device
        )  # the last: of no answer
        logprobs = torch.zeros(num_answers + 1, max_new_tokens, device=device)
        lengths = [0] * num_answers

        spare, longest = SPARE_COLUMNS if num_rows < num_answers else 0, width + max_new_tokens
        num_layers = self.model.config.get_text_config().num_hidden_layers
        room = -(-(longest + spare) // 8) * 8  # a multiple: masks are read by vectors
        fixed = self.fixed and can_be_fixed(self.model, room)
        cache = RowCache(num_layers, num_rows, width=width, room=room, fixed=device if fixed else None)
        step = (FixedStep if fixed else Step)(self.model, cache, longest)
        idle = Row(num_answers, width, width)
        rows = [idle] * num_rows
        read: dict[int, Prefix] = {}  # prompts with answers that have not begun
        begun = 0  # answers, in their order
        hidden = self.policy.head().weight.new_zeros(num_rows, self.policy.head().weight.shape[1])
        while True:
            # ---- the next answers take the rows of those that have ended
            free = [r for r, row in enumerate(rows) if row is idle][: num_answers - begun]
            entering = list(zip(free, range(begun, num_answers), strict=False))
            begun += len(entering)
            new = sorted({s // num_samples for _, s in entering} - read.keys())
            read |= zip(new, self._read([prompts[i] for i in new]), strict=True)
            for i, group in groupby(entering, lambda pair: pair[1] // num_samples):
                taken, answers = zip(*group, strict=True)
                indices = torch.tensor(taken, device=device)
                cache.enter(indices, read[i])
                hidden[indices] = read[i].hidden
                for r, s in zip(taken, answers, strict=True):
                    rows[r] = Row(s, cache.now - len(prompts[i]), cache.now)
                if answers[-1] + 1 == (i + 1) * num_samples:
                    del read[i]
            if entering:
                answer, start, begin = (torch.tensor(x, device=device) for x in zip(*rows, strict=True))  # [R]

            # ---- a token for every row
            token, logprob = self._sample(hidden, temperature, generator)  # [R], [R]
            age = (cache.now - begin).clamp(max=max_new_tokens - 1)
            tokens[answer, age], logprobs[answer, age] = token, logprob
            ended = self._stops(token, answer, age) | (age + 1 == max_new_tokens)
            answer = answer.masked_fill(ended, num_answers)
            for r in ended.nonzero()[:, 0].tolist():
                if rows[r] is not idle:
                    lengths[rows[r].answer] = cache.now - rows[r].begin + 1
                    rows[r] = idle
            active = [r for r, row in enumerate(rows) if row is not idle]
            if begun == num_answers and not active:
                return tokens[:-1], logprobs[:-1], lengths
            if step.may_drop_rows and begun == num_answers and len(active) <= 7 / 8 * len(rows):
                # keeping rows computes for nothing, dropping them copies the cache
                rows = [rows[r] for r in active]
                kept = torch.tensor(active, device=device)
                token, answer, start, begin = (x[kept] for x in (token, answer, start, begin))
                cache.keep(kept)

            # ---- its hidden state
            cache.see_from(min((row.start for row in rows if row is not idle), default=cache.now))
            hidden = step(token, start)  # [R, D]
            cache.now += 1

    def _read(self, prompts: list[list[int]]) -> list[Prefix]:
        """One forward pass over packed prompts."""
        if not prompts:
            return []
        lengths, cache = list(map(len, prompts)), DynamicCache()
        with packed_inputs(pack(prompts, lengths, device=self.model.device)) as inputs:
            hidden = backbone(self.model)(**inputs | dict(past_key_values=cache, use_cache=True)).last_hidden_state[0]
        return prefixes(hidden, cache, lengths)

    def _stops(self, token: Tensor, answer: Tensor, age: Tensor) -> Tensor:
        """[R] bool: whether `token` [R] ends its `answer` [R], which has `age` [R] tokens before it."""
        return torch.stack([token == stop_id for stop_id in self.stop_ids]).any(0)

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
