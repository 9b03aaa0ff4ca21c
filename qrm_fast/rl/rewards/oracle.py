"""A PRM of the embedded task that knows the label of every step, and errs as it is told to."""

import math
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ... import PackedBatch, unpack
from ..arithmetic import arithmetic_steps
from ..data import STEP

CERTAIN = 0.9  # reward of a right step, and below 0 of a wrong one, before the noise


class ArithmeticPRM:
    """Called as a `StepScorer` is: logits [K, 2] whose reward is +-CERTAIN by the label of the step, plus normal noise.

    `spec`: "arithmetic", or with what goes wrong, "arithmetic:noise=0.3,empty=0.9": the standard deviation of the noise
    (0 by default), and the reward of an answer without any text (-CERTAIN). The same text gets the same noise under one
    seed, as it would from a network. Raises ValueError for another spec and for numbers out of range.
    """

    def __init__(self, spec: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.noise, self.empty = 0.0, -CERTAIN
        for part in filter(None, spec.removeprefix("arithmetic").removeprefix(":").split(",")):
            name, _, value = part.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if name not in ("noise", "empty") or not (0 <= number < math.inf if name == "noise" else abs(number) <= 1):
                raise ValueError(f"prm must be such as arithmetic:noise=0.3,empty=0.9, got {part} in {spec}")
            setattr(self, name, number)

    def __call__(self, batch: PackedBatch, step_ends: Tensor) -> Tensor:
        """`batch` as `find_steps` leaves it, a blank line behind every step."""
        rewards: list[float] = []
        rows = batch.input_ids, batch.cu_seqlens
        if batch.whole_rows is not None and batch.whole_cu_seqlens is not None:
            rows = batch.input_ids[batch.whole_rows], batch.whole_cu_seqlens
        for ids, answer in zip(unpack(*rows), batch.action_cu_seqlens.diff().tolist(), strict=True):
            start = len(ids) - answer
            rewards += self._rewards(self.tokenizer.decode(ids[:start]), self.tokenizer.decode(ids[start:]))
        half = torch.tensor(rewards, device=batch.input_ids.device).clamp(-0.999, 0.999).atanh()
        return torch.stack([-half, half], -1)

    def _rewards(self, instruction: str, answer: str) -> list[float]:
        rewards, text = [], instruction
        steps = answer.removesuffix(STEP)
        for step, right in zip(steps.split(STEP), arithmetic_steps(instruction, steps), strict=True):
            text += step + STEP
            reward = (CERTAIN if right else -CERTAIN) if steps else self.empty
            rewards.append(reward + Random(f"{self.seed} {text}").gauss(0, self.noise))
        return rewards
