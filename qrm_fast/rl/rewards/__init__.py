"""Reward streams: what an answer earned, as a whole, step by step or token by token. One file per kind."""

from .credit import Credit, Packed
from .verifier import answer_texts, verified
from .weighted import load_credit

__all__ = ["Credit", "Packed", "answer_texts", "load_credit", "verified"]
