"""Token scores of a reward model that reads another tokenizer, for the policy's own tokens, by character spans."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # first character, and the one after the last


def character_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text that `ids` spell, without special tokens, and the characters of each token in it.

    The ids are taken as they are: sampled tokens need not be those that the tokenizer would choose for their text. The
    tokens of one character share its span. A token without text, such as EOS, has an empty span where it stands.
    """
    text, spans = "", []
    begin = known = (
        0  # what is decoded again, for some tokenizers spell a token by those before it, and what is not new
    )
    for end in range(1, len(ids) + 1):
        piece = _decode(tokenizer, ids[begin:end])[len(_decode(tokenizer, ids[begin:known])) :]
        if piece.endswith("\ufffd") and end < len(ids):  # bytes of a character that is not complete
            continue
        spans += [(len(text), len(text) + len(piece))] * (end - known)
        text += piece
        begin, known = known, end
    return text, spans


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def project_scores(scores: Tensor, spans: Sequence[Span], onto: Sequence[Span], *, additive: bool = False) -> Tensor:
    """Scores of tokens for the tokens of another tokenizer over the same text, [K'] float64.

    `scores`: [K] floating, of tokens with `spans`. `onto`: K' spans. Both as `character_spans` gives them.

    Values, such as a Q-RM's: a character has the score of the token that it is part of, and a token the mean over its
    characters. `additive`, for rewards that are summed: a token's score is shared by its characters evenly, and a token
    gets what its characters hold; the sum stays as it is. The empty spans at the end of the text (EOS) count as one
    character more. An empty span elsewhere is widened to the character before it. Characters of no token, such as
    blanks that an offset mapping trims, have the value of the character before them, and no reward.

    Raises ValueError where the spans are not one per score or do not end at the same character.
    """
    if len(spans) != len(scores):
        raise ValueError(f"spans must be one per score, got {len(spans)} for {len(scores)} scores")
    ends = [max((end for _, end in x), default=0) for x in (spans, onto)]
    if ends[0] != ends[1]:
        raise ValueError(f"both tokenizers must spell one text, got {ends[0]} and {ends[1]} characters")
    if not len(spans) or not len(onto):
        return scores.new_zeros(len(onto), dtype=torch.float64)
    num_characters = ends[0] + 1
    source, target = (_widened(x, ends[0]) for x in (spans, onto))
    values = scores.detach().double().cpu()
    if additive:
        target[-1, 1] = num_characters  # what an EOS earned that was not sampled
        held = _per_character(source, values / (source[:, 1] - source[:, 0]), num_characters)
        held /= _per_character(target, torch.ones(len(target)), num_characters).clamp(min=1)
    else:
        count = _per_character(source, torch.ones_like(values), num_characters)
        held = _per_character(source, values, num_characters) / count.clamp(min=1)
        held = held[torch.arange(num_characters).where(count > 0, 0).cummax(0).values]
    before = torch.cat([held.new_zeros(1), held.cumsum(0)])
    sums = before[target[:, 1]] - before[target[:, 0]]
    return (sums if additive else sums / (target[:, 1] - target[:, 0])).to(scores.device)


def _per_character(spans: Tensor, x: Tensor, num_characters: int) -> Tensor:
    """[characters] float64: the sum of `x` [K] over the tokens of each character."""
    begin, end = spans.unbind(1)
    size = end - begin
    rows = torch.arange(len(spans)).repeat_interleave(size)
    characters = torch.arange(len(rows)) + (begin - size.cumsum(0) + size)[rows]
    return torch.zeros(num_characters, dtype=torch.float64).index_add(0, characters, x.double()[rows])


def _widened(spans: Sequence[Span], end: int) -> Tensor:
    """[K, 2] int64: no span is empty, those at the end of the text are a character of their own."""
    return torch.tensor(
        [(a, b) if a < b else (end, end + 1) if a == end else (max(a - 1, 0), max(a, 1)) for a, b in spans]
    )
