"""Token ids of prompts and responses: templates, control tokens in data, what begins and ends a text.

The tokenizers are small ones of every kind in use, trained here on a few sentences.
"""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from qrm_fast.rl.arithmetic import arithmetic_tokenizer
from qrm_fast.rl.data import Demonstration, Message, Prompt, Rows, read_rows
from qrm_fast.rl.tokenizers import (
    check_same_vocabulary,
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_responses,
    load_stop_ids,
    load_tokenizer,
    stop_ids,
)

CORPUS = [
    "hello there, how are you?\n\nI am fine.",
    "user system assistant <|im_start|> IM_START </s> [INST] <turn> end 1+1=2",
] * 4
NAMES = ["<unk>", "<s>", "</s>", "<|im_end|>"]  # ids 0 to 3: EOS is 2


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(special_tokens=NAMES, initial_alphabet=alphabet, show_progress=False)


def metaspace():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    return tokenizer, trainers.BpeTrainer(special_tokens=NAMES, show_progress=False)


def legacy_llama():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer, trainers.BpeTrainer(special_tokens=NAMES, show_progress=False)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=NAMES, unk_token="<unk>", show_progress=False
    )


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(special_tokens=NAMES, show_progress=False)


KINDS = {make.__name__: make for make in (byte_level, metaspace, legacy_llama, unigram, word_piece)}
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "trimmed": (
        "<s>{% for m in messages %}<turn> {{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<turn> model\n{% endif %}"
    ),
    "inst": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}\n\n[/INST]{% else %} "
        "{{ m.content }} </s>{% endif %}{% endfor %}"
    ),
}


def tokenizer_of(kind, template=None):
    tokenizer, trainer = KINDS[kind]()
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Phi's turn tokens swallow the white space after them; a normalized token is seen in any case of its letters.
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True, normalized=kind == "word_piece")])
    turn = AddedToken("<turn>", normalized=False, rstrip=kind == "metaspace")
    tokenizer.add_tokens([turn, AddedToken("<think>"), AddedToken("\n\n")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATES.get(template),
        clean_up_tokenization_spaces=False,
    )


def ids_of(tokenizer, *names):
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


# ---- control tokens in data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_benign_conversations_are_as_the_template_has_them(kind, template):
    tokenizer = tokenizer_of(kind, template)
    user, answer = Message("user", " hello\nthere, how are you? "), Message("assistant", "I am\n\nfine <think>.")
    for turns in [(user,), (Message("system", "end"), user), (user, answer, user)]:
        messages = [turn._asdict() for turn in turns]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True).input_ids
        assert encode_prompt(tokenizer, turns) == expected
    assert encode_prompt(tokenizer, user.content) == encode_prompt(tokenizer, (user,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("name", ["</s>", "<s>", "<|im_end|>", "<|im_start|>", "<|IM_START|>", "<turn>"])
def test_a_control_token_in_data_is_text(kind, template, name):
    tokenizer = tokenizer_of(kind, template)
    special = ids_of(tokenizer, "<s>", "</s>", "<|im_end|>", "<|im_start|>")
    if template == "trimmed":
        special += ids_of(tokenizer, "<turn>")
    elif name == "<turn>":
        return  # nothing of this template's
    hostile = f"hello {name}{name}\nthere"

    def control(ids):
        return [i for i in ids if i in special]

    prompt, benign = encode_prompt(tokenizer, hostile), encode_prompt(tokenizer, "hello there")
    assert control(prompt) == control(benign) and len(prompt) > len(benign)
    response = encode_response(tokenizer, hostile)
    assert control(response) == [tokenizer.eos_token_id]
    if kind in ("byte_level", "metaspace", "legacy_llama"):  # those that lose no character
        assert tokenizer.decode(response[:-1]) == hostile
    if kind == "byte_level" and template is not None:
        messages = [{"role": "user", "content": hostile}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(prompt) == rendered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("template", "begin"), [("chatml", "<|im_start|>"), ("trimmed", "<turn>")])
def test_turns_beside_a_foreign_one_are_as_they_were(kind, template, begin):
    """The path for data with control tokens gives the ids of the plain path wherever both apply."""
    tokenizer = tokenizer_of(kind, template)
    [begin] = ids_of(tokenizer, begin)

    def turns_of(*contents):
        ids = encode_prompt(tokenizer, tuple(Message("user", content) for content in contents))
        starts = [t for t, i in enumerate(ids) if i == begin]
        return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]

    benign = ["how are you?\n\n", " <think> I am fine "]
    assert turns_of("</s>", *benign)[1:] == turns_of(*benign)
    assert turns_of(*benign, "<turn> <|im_start|> </s>")[:2] == turns_of(*benign)[:2]


def test_private_characters_in_data_forge_nothing():
    tokenizer = tokenizer_of("byte_level", "chatml")
    text = "".join(map(chr, range(0xF0000, 0xF0010))) + "\ue000 2\ue001 <|im_end|>"
    ids = encode_prompt(tokenizer, text)
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    start, end, eos = ids_of(tokenizer, "<|im_start|>", "<|im_end|>", "</s>")
    assert [i for i in ids if i in (start, end, eos)] == [start, end, start]


def test_the_embedded_alphabet_has_no_token_for_foreign_text():
    tokenizer = arithmetic_tokenizer()
    for text in ("7+<eos>", "<eos>", "<pad>", "seven"):
        for encode in (encode_prompt, encode_response):
            with pytest.raises(ValueError, match=r"the tokenizer has no tokens for .*WordLevel error"):
                encode(tokenizer, text)


def test_a_control_token_that_cannot_be_spelled_is_refused():
    """Words are the tokens here: without its first character, the text of one control token is that of another."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "<<s>": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<<s>", unk_token="<unk>"
    )
    assert encode_prompt(tokenizer, "a b") == [3, 0]
    with pytest.raises(ValueError, match="the tokenizer must be able to spell <<s>, got no words for it but itself"):
        encode_prompt(tokenizer, "a <<s>")


def test_words_of_the_model_stay_words():
    """An added token that no template writes is vocabulary: reasoning models are trained on text with it."""
    tokenizer = tokenizer_of("byte_level", "chatml")
    [think] = ids_of(tokenizer, "<think>")
    assert think in encode_prompt(tokenizer, "<think>") and think in encode_response(tokenizer, "<think></s>")


def test_a_changed_template_is_seen():
    tokenizer = tokenizer_of("byte_level")
    [turn] = ids_of(tokenizer, "<turn>")
    assert turn in encode_response(tokenizer, "<turn>")
    tokenizer.chat_template = TEMPLATES["trimmed"]
    assert turn not in encode_response(tokenizer, "<turn>")


# ---- what begins and ends a prompt


def with_ends(single, kind="byte_level"):
    tokenizer = tokenizer_of(kind)
    tokens = [*((name, i) for i, name in enumerate(NAMES)), ("word", 9)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("single", "begin"),
    [("$A </s>", []), ("<s> $A </s>", [1]), ("<s> $A", [1]), ("<s> </s> $A </s> </s>", [1, 2]), ("word $A word", [9])],
)
def test_no_prompt_is_ended(kind, single, begin):
    tokenizer = with_ends(single, kind)
    plain = tokenizer("hello there", add_special_tokens=False).input_ids
    assert encode_prompt(tokenizer, "hello there") == begin + plain
    assert encode_response(tokenizer, "hello there") == [*plain, 2]
    hostile = encode_prompt(tokenizer, "hello</s>")
    assert hostile[: len(begin)] == begin and 2 not in hostile[len(begin) :]


def test_sep_and_cls_are_not_eos_but_end_a_text_too():
    tokenizer = with_ends("<s> $A <|im_end|>")
    assert encode_prompt(tokenizer, "hello") == [1, *tokenizer("hello", add_special_tokens=False).input_ids]


def test_llama_that_adds_eos(tmp_path):
    tokenizer = with_ends("<s> $A </s>")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("ab").input_ids[-1] == 2
    assert encode_prompt(loaded, "ab") == [1, *loaded("ab", add_special_tokens=False).input_ids]


def test_a_prompt_without_tokens_is_refused():
    for tokenizer in (arithmetic_tokenizer(), with_ends("<s> $A </s>"), with_ends("$A </s>")):
        with pytest.raises(ValueError, match="a prompt must have at least one token, got none for the instruction ''"):
            encode_prompt(tokenizer, "")


# ---- what ends a response


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        ("chatml", [1, 3], [3, 2, 1]),
        ("trimmed", [2, 3], [3, 2]),
        ("chatml", 3, [3, 2]),
        ("chatml", 2, [2]),  # the model does not stop at the turn's end
        ("chatml", None, [2]),
        ("inst", [2, 3], [2, 3]),  # turns end with EOS
        (None, [1, 3], [2, 1, 3]),
    ],
)
def test_training_texts_end_with_the_turn_token_where_it_stops_the_model(template, eos, expected):
    tokenizer = tokenizer_of("byte_level", template)
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=eos)) == expected
    assert encode_response(tokenizer, "hello", expected[0])[-1] == expected[0]


def test_stop_ids_without_a_configuration_and_of_odd_templates():
    tokenizer = tokenizer_of("byte_level", "chatml")
    assert stop_ids(tokenizer) == [2] and encode_response(tokenizer, "hello")[-1] == 2
    said = GenerationConfig(eos_token_id=[2, 3, 4])
    [start] = ids_of(tokenizer, "<|im_start|>")
    # GLM: nothing after the assistant's turn but the beginning of the user's, and that is what stops the model
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[2, start]))[0] == start
    tokenizer.chat_template = "{{ raise_exception('one turn only') if messages | length > 1 }}{{ messages[0].content }}"
    assert stop_ids(tokenizer, said)[0] == 2
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert stop_ids(tokenizer, said)[0] == 2


def test_stop_ids_are_read_from_the_files_of_a_model(tmp_path):
    tokenizer = tokenizer_of("byte_level", "chatml")
    assert load_stop_ids("scratch:demo", tokenizer) == [2]
    LlamaConfig(eos_token_id=[2, 3]).save_pretrained(tmp_path)
    assert load_stop_ids(str(tmp_path), tokenizer) == [3, 2]
    GenerationConfig(eos_token_id=[1, 2]).save_pretrained(tmp_path)
    assert load_stop_ids(str(tmp_path), tokenizer) == [2, 1]


# ---- rows


def test_what_is_refused_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "7+6:", "response": "1"}, {"prompt": "seven", "response": "one"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    rows = read_rows(path, Demonstration)
    with pytest.raises(ValueError, match=r"rows.jsonl:3: the tokenizer has no tokens for"):
        encode_prompts(arithmetic_tokenizer(), rows)
    with pytest.raises(ValueError, match=r"rows.jsonl:3: the tokenizer has no tokens for"):
        encode_responses(arithmetic_tokenizer(), rows, "response")
    tokenizer = tokenizer_of("byte_level", "chatml")
    assert encode_prompts(tokenizer, rows) == [encode_prompt(tokenizer, row.instruction) for row in rows]
    ends = [encode_response(tokenizer, row.response, 3) for row in rows]
    assert encode_responses(tokenizer, rows, "response", 3) == ends and ends[0][-1] == 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system turns') }}", "TemplateError: no system turns"),
        ("{{ messages[0].tools.names }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_raises_is_one_sentence(template, message):
    tokenizer = tokenizer_of("byte_level")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"rows.jsonl:4: the chat template refuses the conversation: .*{message}"):
        encode_prompts(tokenizer, Rows([Prompt("hello")], ["rows.jsonl:4"]))


def test_messages_need_a_template_and_surrogates_are_no_text():
    tokenizer = tokenizer_of("byte_level")
    with pytest.raises(
        ValueError, match="a prompt of messages needs a tokenizer with a chat template, got one without"
    ):
        encode_prompt(tokenizer, (Message("user", "hello"),))
    for encode in (encode_prompt, encode_response):
        with pytest.raises(ValueError, match=r"got the lone surrogate '\\udcff'"):
            encode(tokenizer, "hello \udcff")


def test_chat_template_is_used_where_there_is_one():
    tokenizer = load_tokenizer("bpe", ["hello there"])
    plain = encode_prompt(tokenizer, "hello")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    assert tokenizer.decode(plain) == "hello"
    assert tokenizer.decode(encode_prompt(tokenizer, "hello")) == "<user>hello!"


# ---- loading


def test_bpe_is_trained_on_the_corpus_and_round_trips():
    corpus = ["Janet's ducks lay 16 eggs.\n\nSo 16 - 3 = 13."] * 3
    tokenizer = load_tokenizer("bpe", corpus)
    ids = tokenizer(corpus[0]).input_ids
    assert tokenizer.decode(ids) == corpus[0] and len(ids) < 20
    assert tokenizer.decode(tokenizer("never seen: 猫").input_ids) == "never seen: 猫"
    assert tokenizer.eos_token_id is not None
    with pytest.raises(ValueError, match='"bpe" is trained on the texts of the data, got no text'):
        load_tokenizer("bpe")
    with pytest.raises(ValueError, match="scratch:demo has no tokenizer of its own"):
        load_tokenizer("scratch:demo")


def test_vocabularies_must_be_the_same():
    tokenizer = load_tokenizer("arithmetic")
    check_same_vocabulary(tokenizer, load_tokenizer("arithmetic"))
    other = load_tokenizer("bpe", ["1+1"])
    with pytest.raises(
        ValueError, match=r"must share one vocabulary, got 18 and \d+ tokens.* token '\\n\\n' has id 16"
    ):
        check_same_vocabulary(tokenizer, other)
    moved = load_tokenizer("arithmetic")
    moved.eos_token = "#"
    with pytest.raises(ValueError, match="EOS ids 1 and 14"):
        check_same_vocabulary(tokenizer, moved)


def test_a_tokenizer_needs_an_eos(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=byte_level()[0]).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id is None
    with pytest.raises(ValueError, match="must have an EOS token, which ends every response, got none in"):
        load_tokenizer(str(tmp_path))
