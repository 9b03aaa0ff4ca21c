"""What a trained reward model thinks of given answers: Q of every token, or a reward of every step."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import min_form_returns, pack, prm_rewards, q_token_rewards, unpack
from .attention import check_packing
from .control_tokens import text_ids
from .data import STEP
from .models import check_context, is_vocabulary_q, load_prm, load_q_rm, load_vocabulary_q
from .prm import separator_id, separator_of
from .scorer import StepScorer, TokenScorer, VocabularyScorer
from .tokenizers import encode_prompt, encode_response, load_stop_ids, load_tokenizer

TEMPERATURE = 0.1  # of PURE's soft minimum


class TokenScores(NamedTuple):
    tokens: list[str]  # text of each response token, EOS last
    q: list[float]
    normalized: list[float]  # (q - mean) / std over the tokens of every answer scored together


class StepScores(NamedTuple):
    steps: list[str]
    rewards: list[float]  # in [-1, 1]
    weights: list[float]  # of each step in the soft minimum
    outcome: float  # the soft minimum of the rewards, which PURE maximises


def score(
    q_rm: str, prompt: str, responses: list[str], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[TokenScores]:
    """Q of every token of each response to one prompt, EOS included, by the Q-RM or ORM at the directory or id `q_rm`.

    The loss over pairs (arXiv 2505.23363) leaves Q an offset per prompt, so only differences between tokens after one
    prompt mean something: `normalized` removes the mean. Raises ValueError where `q_rm` has no trained head or the
    prompt is empty, an answer passes the Q-RM's context or a score is not finite, OSError where there is no such
    checkpoint.
    """
    tokenizer = load_tokenizer(q_rm)
    scorer: TokenScorer | VocabularyScorer
    if is_vocabulary_q(q_rm):
        scorer = VocabularyScorer(load_vocabulary_q(q_rm, tokenizer, device=device, dtype=dtype))
    else:
        model = load_q_rm(q_rm, tokenizer, kind="either", device=device, dtype=dtype)
        scorer = TokenScorer(model, reads_action=True)
    prompt_ids = encode_prompt(tokenizer, prompt)
    end_id = load_stop_ids(q_rm, tokenizer)[0]
    answers = [encode_response(tokenizer, response, end_id) for response in responses]
    _check_model(scorer.model, len(prompt_ids) + max(map(len, answers)))
    batch = pack([prompt_ids + answer for answer in answers], [len(prompt_ids)] * len(answers), device=device)
    with torch.no_grad():
        q = scorer(batch)  # [T]
    _check_scores(q, batch.seq_ids, "token")
    columns = (q, q_token_rewards(q, batch.action_cu_seqlens, center=True))
    per_answer = zip(answers, *(unpack(x.cpu(), batch.action_cu_seqlens.cpu()) for x in columns), strict=True)
    return [
        TokenScores([tokenizer.decode([i]) for i in answer], q.tolist(), normalized.tolist())
        for answer, q, normalized in per_answer
    ]


def score_steps(
    prm: str,
    prompt: str,
    responses: list[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[StepScores]:
    """The reward of every step of each response to one prompt, by the PRM at the directory or id `prm`.

    A blank line separates steps. Each is tokenised alone with the PRM's separator behind it, as in training, and
    rewarded by P(right) - P(wrong) there. Raises as `score` does, ValueError where `prm` has no trained head of two
    labels.
    """
    tokenizer = load_tokenizer(prm)
    model = load_prm(prm, tokenizer, device=device, dtype=dtype)
    separator = separator_id(tokenizer, separator_of(model.config))
    prompt_ids = encode_prompt(tokenizer, prompt)
    steps = [response.split(STEP) for response in responses]
    tokens = [[[*text_ids(tokenizer, step), separator] for step in answer] for answer in steps]
    answers = [sum(answer, prompt_ids) for answer in tokens]
    _check_model(model, max(map(len, answers)))
    batch = pack(answers, [len(prompt_ids)] * len(answers), device=device)
    ends = torch.tensor([len(step) for answer in tokens for step in answer], device=device).cumsum(0) - 1
    rewards = prm_rewards(StepScorer(model)(batch, ends))  # [K]
    _check_scores(rewards, batch.seq_ids[ends], "step")
    cu_seqlens = batch.action_cu_seqlens
    outcome = min_form_returns(
        rewards, ends, cu_seqlens, temperature=TEMPERATURE, num_tokens=len(batch.seq_ids)
    ).outcome
    return [
        StepScores(texts, r.tolist(), (-r.double() / TEMPERATURE).softmax(0).tolist(), total)
        for texts, r, total in zip(steps, rewards.split(list(map(len, steps))), outcome.tolist(), strict=True)
    ]


def _check_model(model: PreTrainedModel, longest: int) -> None:
    check_context(model, longest)
    check_packing(model, longest)


def _check_scores(scores: Tensor, response: Tensor, what: str) -> None:
    """Raise ValueError, naming the first, where a score is not finite. `response`: of each score, from 0."""
    if not scores.isfinite().all():
        first = int((~scores.isfinite()).nonzero()[0, 0])
        number = first - int((response < response[first]).sum()) + 1
        raise ValueError(
            f"scores must be finite, got {scores[first].item()} for {what} {number} of response {response[first] + 1}: "
            "the model's head is broken"
        )
