"""Scores carried from one tokenizer to another by the characters of their tokens."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qrm_fast.rl.span_projection import character_spans, project_scores


def byte_level(merges):
    """Single bytes and these pairs, with an EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(pair.split()) for pair in merges]
    vocab = {token: i for i, token in enumerate(["</s>", *alphabet, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_spans_of_tokens():
    """Two tokens of one character share it; EOS is empty; ids need not be the tokenizer's own choice."""
    tokenizer = byte_level(["a b", "Ġ c"])
    a, b, ab, c = tokenizer.convert_tokens_to_ids(["a", "b", "ab", "Ġc"])
    accent = tokenizer("é")["input_ids"]
    assert len(accent) == 2
    text, spans = character_spans(tokenizer, [ab, *accent, c, a, b, tokenizer.eos_token_id])
    assert text == "abé cab"
    assert spans == [(0, 2), (2, 3), (2, 3), (3, 5), (5, 6), (6, 7), (7, 7)]
    assert character_spans(tokenizer, []) == ("", [])


def test_spans_where_blanks_depend_on_the_token_before():
    """As Llama's: the first token has no blank in front."""
    tokenizer = Tokenizer(models.WordLevel(vocab={"▁a": 0, "▁bc": 1, "▁.": 2}, unk_token="▁."))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert character_spans(tokenizer, [0, 1, 0, 2]) == ("a bc a .", [(0, 1), (1, 4), (4, 6), (6, 8)])


def test_spans_of_a_cut_character_and_of_long_texts():
    tokenizer = byte_level(["a b"])
    first, _ = tokenizer("é")["input_ids"]
    text, spans = character_spans(tokenizer, [first])
    assert spans == [(0, len(text))]
    text = "Grüße, 世界! " * 20
    ids = tokenizer(text)["input_ids"]
    spelled, spans = character_spans(tokenizer, ids)
    assert spelled == text and len(spans) == len(ids)
    assert all(begin < end for begin, end in spans) and spans[-1][1] == len(text)


SOURCE = [(0, 2), (2, 6), (6, 6)]  # "ab", "cdef", EOS
TARGET = [(0, 1), (1, 3), (3, 6), (6, 6)]  # "a", "bc", "def", EOS


@pytest.mark.parametrize(
    ("spans", "onto", "additive", "want"),
    [
        (SOURCE, TARGET, False, [2.0, 5.0, 8.0, 1.0]),  # b has 2 and c has 8
        (SOURCE, TARGET, True, [1.0, 1.0 + 2.0, 6.0, 1.0]),
        (SOURCE, TARGET[:-1], True, [1.0, 3.0, 7.0]),  # no EOS was sampled: the last token has its reward
        (SOURCE, SOURCE, False, [2.0, 8.0, 1.0]),
        (SOURCE, SOURCE, True, [2.0, 8.0, 1.0]),
        (SOURCE[:2], TARGET, False, [2.0, 5.0, 8.0, 8.0]),  # an EOS that the reward model did not read
        ([(0, 2), (3, 6), (6, 6)], TARGET, False, [2.0, 2.0, 8.0, 1.0]),  # a blank between offsets
        ([(0, 2), (2, 6), (2, 6)], [(0, 2), (2, 6)], False, [2.0, 4.5]),  # two tokens of one character
        ([(0, 2), (2, 6), (2, 6)], [(0, 2), (2, 6), (2, 6)], True, [2.0, 4.5, 4.5]),
    ],
)
def test_by_hand(spans, onto, additive, want):
    scores = torch.tensor([2.0, 8.0, 1.0])[: len(spans)]
    got = project_scores(scores, spans, onto, additive=additive)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    if additive:
        assert got.sum().item() == pytest.approx(scores.sum().item())


def test_between_two_tokenizers():
    """A policy of single bytes and a reward model with merges, on the same text."""
    policy, reward = byte_level([]), byte_level(["a b", "ab c"])
    ids = policy("abcab")["input_ids"]
    text, onto = character_spans(policy, ids)
    reward_text, spans = character_spans(reward, reward(text)["input_ids"])
    assert reward_text == text and spans == [(0, 3), (3, 5)]
    assert project_scores(torch.tensor([3.0, 7.0]), spans, onto).tolist() == [3.0, 3.0, 3.0, 7.0, 7.0]
    additive = project_scores(torch.tensor([3.0, 7.0]), spans, onto, additive=True)
    assert additive.tolist() == [1.0, 1.0, 1.0, 3.5, 3.5]


def test_bad_input():
    with pytest.raises(ValueError, match="spans must be one per score, got 1 for 2 scores"):
        project_scores(torch.zeros(2), [(0, 1)], [(0, 1)])
    with pytest.raises(ValueError, match="must spell one text, got 1 and 2 characters"):
        project_scores(torch.zeros(1), [(0, 1)], [(0, 2)])
    assert project_scores(torch.empty(0), [], []).shape == (0,)
