"""Text and control tokens: data are text, and only a chat template writes the tokens that begin and end turns.

The text of a control token inside a prompt or a response is tokenised like any other text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from secrets import token_hex
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .data import Message, check_text


class Control(NamedTuple):
    ids: dict[int, str]  # of the control tokens, and their texts
    pattern: re.Pattern  # the text of any of them
    turn_end: int | None  # the first that the chat template writes after an answer of the assistant


class Literal(NamedTuple):
    backend: Tokenizer  # to which the text of a control token is a text
    stand_ins: dict[str, str]  # of a control token's text, what the backend takes for that token
    ids: dict[int, int]  # of the stand-ins, and the ids they stand for


def find_control(tokenizer: PreTrainedTokenizerBase) -> Control:
    """The control tokens of a tokenizer and its present chat template."""
    return _control_of(tokenizer, str(tokenizer.chat_template), tuple(tokenizer.all_special_ids))


@lru_cache(maxsize=8)
def _control_of(tokenizer: PreTrainedTokenizerBase, template: str, special_ids: tuple[int, ...]) -> Control:
    """Control tokens: the special ones, and the others that the chat template writes between turns.

    Other added tokens, `<think>` for one, are words of the model's, which data may hold.
    """
    mark = "\ue000"
    user, assistant = Message("user", mark), Message("assistant", mark)
    before, after = "", ""
    if tokenizer.chat_template is not None:
        before = _probe(tokenizer, [user], add_generation_prompt=True)
        pieces = _probe(tokenizer, [user, assistant, user]).split(mark)
        after = pieces[2] if len(pieces) == 4 else ""
    added = tokenizer.added_tokens_decoder
    ids = {
        i: token.content
        for i, token in added.items()
        if token.special or i in special_ids or (token.content in before + mark + after and token.content.strip())
    }
    names = [
        rf"(?<!\w){re.escape(name)}(?!\w)" if added[i].single_word else re.escape(name)
        for i, name in sorted(ids.items(), key=lambda item: len(item[1]), reverse=True)  # the longest is found first
    ]
    pattern = re.compile("|".join(names) or "(?!)")  # (?!) is found nowhere
    ends = pattern.search(after)
    return Control(ids, pattern, tokenizer.convert_tokens_to_ids(ends[0]) if ends else None)


def _probe(tokenizer: PreTrainedTokenizerBase, turns: list[Message], **options: bool) -> str:
    try:
        return _render(tokenizer, turns, **options)
    except ValueError:  # not a conversation of this template's: it says nothing about control tokens
        return ""


def _render(tokenizer: PreTrainedTokenizerBase, turns: Iterable[Message], **options: bool) -> str:
    try:
        return tokenizer.apply_chat_template([turn._asdict() for turn in turns], tokenize=False, **options)
    except Exception as error:  # a template is a program, of whoever made the checkpoint
        raise ValueError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error


def _literal(tokenizer: PreTrainedTokenizerBase) -> Literal:
    return _make_literal(tokenizer, str(tokenizer.chat_template), tuple(tokenizer.all_special_ids))


@lru_cache(maxsize=2)
def _make_literal(tokenizer: PreTrainedTokenizerBase, template: str, special_ids: tuple[int, ...]) -> Literal:
    """A copy of the tokenizer's backend in which control tokens go by names that no data can hold."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"a text that holds a control token needs a tokenizer with a Rust backend, got {type(tokenizer).__name__}"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    secret, added, ids = token_hex(16), tokenizer.added_tokens_decoder, {}
    control = _control_of(tokenizer, template, special_ids).ids
    stand_ins = {text: f"\ue000{secret} {i}\ue001" for i, text in control.items()}
    backend.add_special_tokens([AddedToken(text, special=True) for text in stand_ins])
    backend.encode_special_tokens = True  # from now on special tokens are text, and the stand-ins are not special
    for i, text in control.items():
        stand_in = AddedToken(stand_ins[text], normalized=False, lstrip=added[i].lstrip, rstrip=added[i].rstrip)
        backend.add_tokens([stand_in])
        place = backend.token_to_id(stand_ins[text])
        assert place is not None
        ids[place] = i
    return Literal(backend, stand_ins, ids)


def _literal_ids(tokenizer: PreTrainedTokenizerBase, literal: Literal, text: str) -> list[int]:
    """Ids of a text in which stand-ins are control tokens, and nothing else is."""
    control = find_control(tokenizer).ids.keys() - {tokenizer.unk_token_id}
    with _words_for(text):
        ids = literal.backend.encode(text, add_special_tokens=False).ids
    spelled = sorted(control.intersection(ids))
    if spelled:  # the model has the text of a control token among its words, as Unigram does
        ids = [word for i in ids for word in (_in_two(tokenizer, literal, i) if i in spelled else [i])]
        if not control.isdisjoint(ids):
            names = tokenizer.convert_ids_to_tokens(spelled)
            raise ValueError(f"the tokenizer must be able to spell {', '.join(names)}, got no words for it but itself")
    return [literal.ids.get(i, i) for i in ids]


def _in_two(tokenizer: PreTrainedTokenizerBase, literal: Literal, i: int) -> list[int]:
    """The text of a token as two words or more."""
    text = tokenizer.convert_ids_to_tokens(i)
    with _words_for(text):
        return [word.id for half in (text[:1], text[1:]) for word in literal.backend.model.tokenize(half)]


@contextmanager
def _words_for(text: str) -> Iterator[None]:
    """Say which text it is that tokenizers has no words for."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # a bare Exception is how tokenizers refuses a text outside a fixed alphabet
            raise
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        raise ValueError(f"the tokenizer has no tokens for {shown!r}: {error}") from None


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> BatchEncoding:
    """What the tokenizer makes of a text. Raises ValueError where it has no tokens for it."""
    check_text(text, "a prompt or a response")
    with _words_for(text):
        return tokenizer(text, **options)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, begin: bool = False) -> list[int]:
    """Ids of a text in which nothing is a control token; `begin`: after what the tokenizer puts before a text."""
    read = tokenize(tokenizer, text, add_special_tokens=begin, return_special_tokens_mask=begin)
    ids, before = read.input_ids, []
    if begin:
        mask = read.special_tokens_mask  # 0 is the text, 1 what was added before and after
        if 0 not in mask:
            return []
        first = mask.index(0)
        before, ids = ids[:first], ids[first : len(ids) - mask[::-1].index(0)]
    if not find_control(tokenizer).ids.keys().isdisjoint(ids):
        ids = _literal_ids(tokenizer, _literal(tokenizer), text)
    return before + ids


def chat_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to the assistant's turn that comes next; only the template writes control tokens."""
    control = find_control(tokenizer)
    text = _render(tokenizer, turns, add_generation_prompt=True)
    ids = tokenize(tokenizer, text, add_special_tokens=False).input_ids
    found = [i for i in ids if i in control.ids and i != tokenizer.unk_token_id]
    contents = "\ue000".join(turn.content for turn in turns)
    # A tokenizer that lowers case, say, can see control tokens that the pattern does not.
    if not control.pattern.search(contents) and len(found) == len(control.pattern.findall(text)):
        return ids
    # Each control token in the data becomes a character that is found nowhere else, the template is rendered around
    # it, and what the template has written goes by the stand-ins before the data get their text back.
    literal = _literal(tokenizer)
    spare = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in contents + text)
    hidden = {name: next(spare) for name in sorted(set(control.pattern.findall(contents)))}
    hide = [Message(role, control.pattern.sub(lambda m: hidden[m[0]], content)) for role, content in turns]
    text = _render(tokenizer, hide, add_generation_prompt=True)
    text = control.pattern.sub(lambda m: literal.stand_ins[m[0]], text)
    for name, char in hidden.items():
        text = text.replace(char, name)
    return _literal_ids(tokenizer, literal, text)
