"""Tokenizers, and the token ids of prompts and responses."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.peft_utils import find_adapter_config_file

from .arithmetic import arithmetic_tokenizer
from .control_tokens import chat_ids, find_control, text_ids
from .data import Instruction, Message, Rows, at
from .gguf import checkpoint_of

BPE_VOCABULARY = 4096


def load_tokenizer(spec: str, corpus: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer: "arithmetic" (the embedded task's), "bpe" (byte-level BPE of at most 4096 ids, trained on
    `corpus`), or that of a Hugging Face id, a directory or a GGUF file.

    Raises ValueError for "bpe" without a corpus, for a scratch model and for a tokenizer without an EOS token.
    """
    if spec == "arithmetic":
        return arithmetic_tokenizer()
    if spec == "bpe":
        return _byte_level_bpe(corpus)
    if spec.startswith("scratch:"):
        raise ValueError(
            f'{spec} has no tokenizer of its own, expected tokenizer "arithmetic", "bpe" or a checkpoint\'s'
        )
    spec = checkpoint_of(spec)
    base = adapter_base(spec)
    if base is not None and not (Path(spec) / "tokenizer_config.json").is_file():
        spec = base
    tokenizer = AutoTokenizer.from_pretrained(spec)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer must have an EOS token, which ends every response, got none in {spec}")
    return tokenizer


def adapter_base(spec: str) -> str | None:
    """The model that the adapter of peft's at `spec` was trained on, None where there is no adapter.

    Raises ValueError for an adapter that names none.
    """
    path = find_adapter_config_file(checkpoint_of(spec))
    if path is None:
        return None
    base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter {spec} must name the model it belongs to, base_model_name_or_path, got {base!r}")
    return base


def lasting(spec: str) -> str:
    """`spec` as a checkpoint may name it: a directory, also that of a GGUF file, by its absolute path, which does not
    hang on where a run was."""
    spec = checkpoint_of(spec)
    return str(Path(spec).resolve()) if Path(spec).is_dir() else spec


def _byte_level_bpe(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    corpus = list(corpus)
    if not corpus:
        raise ValueError('tokenizer "bpe" is trained on the texts of the data, got no text')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def check_same_vocabulary(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token has the same id for both: a Q-RM scores the policy's token ids."""
    ours, theirs = policy.get_vocab(), reward.get_vocab()
    if ours == theirs and policy.eos_token_id == reward.eos_token_id:
        return
    different = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    token = min(different, default="")
    raise ValueError(
        f"policy and reward model must share one vocabulary, got {len(ours)} and {len(theirs)} tokens, EOS ids "
        f"{policy.eos_token_id} and {reward.eos_token_id}; token {token!r} has id {ours.get(token)} in the policy's "
        f"and {theirs.get(token)} in the reward model's"
    )


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> list[int]:
    """Ids that end a response, the one that ends training texts first.

    These are the tokenizer's EOS and what the model's generation configuration names. Where it names the token that
    the chat template writes after the assistant's turn, training texts end with that one, as the model's own do.
    """
    named = getattr(generation_config, "eos_token_id", None)
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    turn = find_control(tokenizer).turn_end
    return list(dict.fromkeys([*([turn] if turn in named else []), tokenizer.eos_token_id, *named]))


def load_stop_ids(spec: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`stop_ids` of the model at `spec`, as `load_policy` takes it, by its files alone."""
    if spec.startswith("scratch:"):
        return stop_ids(tokenizer)
    spec = checkpoint_of(spec)
    base = adapter_base(spec)
    if base is not None:
        return load_stop_ids(base, tokenizer)
    try:
        generation_config = GenerationConfig.from_pretrained(spec)
    except OSError:  # there is none: transformers then generates by the model's configuration
        generation_config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(spec))
    return stop_ids(tokenizer, generation_config)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[list[int]]:
    """`encode_prompt` of every row. A prompt that is refused is named by its file and line."""
    prompts = []
    for row, place in zip(rows, rows.places, strict=True):
        with at(place):
            prompts.append(encode_prompt(tokenizer, row.instruction))
    return prompts


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, field: str, end_id: int | None = None
) -> list[list[int]]:
    """`encode_response` of one field of every row. A response that is refused is named by its file and line."""
    responses = []
    for row, place in zip(rows, rows.places, strict=True):
        with at(place):
            responses.append(encode_response(tokenizer, getattr(row, field), end_id))
    return responses


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: Instruction) -> list[int]:
    """Token ids of a prompt: through the tokenizer's chat template where it has one, else the plain text.

    What a tokenizer puts before a text (BOS) stays, what it puts after one (EOS) does not: the response comes next.
    Raises ValueError for a prompt without tokens, which nothing could be predicted from, for messages where there is no
    chat template, for a prompt that the template refuses and for a text the tokenizer has no tokens for.
    """
    if tokenizer.chat_template is not None:
        turns = (Message("user", instruction),) if isinstance(instruction, str) else instruction
        return chat_ids(tokenizer, turns)
    if not isinstance(instruction, str):
        raise ValueError("a prompt of messages needs a tokenizer with a chat template, got one without")
    ids = text_ids(tokenizer, instruction, begin=True)
    if not ids:
        raise ValueError(f"a prompt must have at least one token, got none for the instruction {instruction!r}")
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, end_id: int | None = None) -> list[int]:
    """Token ids of a response, tokenised on its own, and the token that ends it, which is an action like any other.

    `end_id` is the first of the model's `stop_ids`, None the tokenizer's EOS. Raises ValueError for a text the
    tokenizer has no tokens for.
    """
    return [*text_ids(tokenizer, response), tokenizer.eos_token_id if end_id is None else end_id]
