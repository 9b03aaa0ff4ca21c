"""Per-token Q of given answers: what a trained Q-RM thinks of text."""

from typing import NamedTuple

import torch

from .. import pack, q_token_rewards, unpack
from .attention import check_packing
from .models import check_context, load_q_rm
from .scorer import TokenScorer
from .tokenizers import encode_prompt, encode_response, load_stop_ids, load_tokenizer


class TokenScores(NamedTuple):
    tokens: list[str]  # text of each response token, EOS last
    q: list[float]
    normalized: list[float]  # (q - mean) / std over the tokens of every answer scored together


def score(
    q_rm: str, prompt: str, responses: list[str], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[TokenScores]:
    """Q of every token of each response to one prompt, EOS included, by the Q-RM at the directory or id `q_rm`.

    The loss over pairs (arXiv 2505.23363) leaves Q an offset per prompt, so only differences between tokens after one
    prompt mean something: `normalized` removes the mean. Raises ValueError where `q_rm` has no trained scalar head or
    the prompt is empty, or an answer passes the Q-RM's context, OSError where there is no such checkpoint.
    """
    tokenizer = load_tokenizer(q_rm)
    model = load_q_rm(q_rm, tokenizer, device=device, dtype=dtype)
    prompt_ids = encode_prompt(tokenizer, prompt)
    end_id = load_stop_ids(q_rm, tokenizer)[0]
    answers = [encode_response(tokenizer, response, end_id) for response in responses]
    longest = len(prompt_ids) + max(map(len, answers))
    check_context(model, longest)
    check_packing(model, longest)
    batch = pack([prompt_ids + answer for answer in answers], [len(prompt_ids)] * len(answers), device=device)
    q = TokenScorer(model, reads_action=True)(batch)  # [T]
    columns = (q, q_token_rewards(q, batch.action_cu_seqlens, center=True))
    per_answer = zip(answers, *(unpack(x.cpu(), batch.action_cu_seqlens.cpu()) for x in columns), strict=True)
    return [
        TokenScores([tokenizer.decode([i]) for i in answer], q.tolist(), normalized.tolist())
        for answer, q, normalized in per_answer
    ]
