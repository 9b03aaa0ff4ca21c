"""Coefficients of the loss that change from iteration to iteration."""

from dataclasses import replace
from typing import Any

from .config import Config, parse_anneal

GAIN, MOST = 0.1, 0.2  # of the controller: how fast it follows an error, and the largest one that it believes


class Coefficients:
    """What an iteration trains with in the place of its configuration's coefficients.

    anneal       at iteration i of N an option that is named there counts (N - i) / N times: clip ranges, entropy
                 and KL coefficients that fall to 0 in a straight line
    adaptive_kl  kl_coef times 1 + 0.1 clip(KL / adaptive_kl - 1, -0.2, 0.2) after every iteration, with its mean KL
                 per token (arXiv 1909.08593, section 2.2)
    """

    def __init__(self, config: Config) -> None:
        self.config, self.names, self.kl_share = config, parse_anneal(config), 1.0

    def at(self, iteration: int) -> Config:
        """The configuration of this iteration, counted from 0."""
        left = 1 - iteration / self.config.num_iterations
        values: dict[str, Any] = {name: getattr(self.config, name) * left for name in self.names}
        if self.config.adaptive_kl:
            values["kl_coef"] = self.config.kl_coef * self.kl_share
        return replace(self.config, **values)

    def observe(self, ref_kl: float) -> None:
        """Follow the mean KL per token of the iteration that has ended; one that is not finite is not believed."""
        if self.config.adaptive_kl and abs(ref_kl) < float("inf"):
            error = min(MOST, max(-MOST, ref_kl / self.config.adaptive_kl - 1))
            self.kl_share *= 1 + GAIN * error

    def metrics(self, now: Config) -> dict[str, float]:
        """Those that change, as `now`, an iteration's configuration, has them."""
        names = [*self.names, "kl_coef"] if self.config.adaptive_kl else self.names
        return {f"policy/{name}": getattr(now, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {"kl_share": self.kl_share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl_share = state["kl_share"]
