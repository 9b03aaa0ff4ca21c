"""Tokenizers, and the token ids of prompts and responses."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .arithmetic import arithmetic_tokenizer

BPE_VOCABULARY = 4096


def load_tokenizer(spec: str, corpus: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer: "arithmetic" (the embedded task's), "bpe" (byte-level BPE of at most 4096 ids, trained on
    `corpus`), or a Hugging Face id or directory.

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
    tokenizer = AutoTokenizer.from_pretrained(spec)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer must have an EOS token, which ends every response, got none in {spec}")
    return tokenizer


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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """Token ids of a prompt: through the tokenizer's chat template where it has one, else the plain text.

    Raises ValueError for a prompt without tokens, which nothing could be predicted from.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer(instruction).input_ids
        if not ids:
            raise ValueError(f"a prompt must have at least one token, got none for the instruction {instruction!r}")
        return ids
    turn = [{"role": "user", "content": instruction}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response, tokenised on its own and ended by EOS, which is an action like any other."""
    return [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
