"""GGUF files (llama.cpp's format), each dequantised once to an ordinary checkpoint, which then stands for it."""

import json
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import save_checkpoint


def checkpoint_of(spec: str) -> str:
    """The checkpoint that was made of the GGUF file `spec`; every other model as it is.

    It lies beside the file: float32 weights, which hold every value of a quantised one, and the tokenizer, in
    `NAME.dequantised` for `NAME.gguf`. The first call writes it, whole or not at all. Raises ValueError for a file that
    is no GGUF or that transformers cannot dequantise, without the packages that it needs to, and for a checkpoint that
    is older than its file; OSError where there is no file, or no writing beside it.
    """
    path = Path(spec)
    if path.suffix != ".gguf" or path.is_dir():
        return spec
    made = path.with_suffix(".dequantised")
    if made.is_dir():
        if made.stat().st_mtime < path.stat().st_mtime:
            raise ValueError(f"{made} must be newer than {spec}, which it was made of, got an older one: remove it")
        return str(made)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{spec} must be a GGUF file, which begins with b'GGUF', got {magic!r}")
    for package in ("gguf", "accelerate"):  # transformers asks for both
        if find_spec(package) is None:
            raise ValueError(f"{spec} is a GGUF file, which needs the package {package}, pip install 'qrm_fast[gguf]'")
    warnings.warn(f"{spec} is dequantised, once, to {made}", stacklevel=2)
    with TemporaryDirectory(dir=path.parent, prefix=".saving") as aside:
        save_checkpoint(*_dequantised(path), aside + "/whole")
        try:
            os.rename(aside + "/whole", made)
        except OSError:  # another process may have been first
            if not made.is_dir():
                raise
    return str(made)


def _dequantised(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
    try:
        config = AutoConfig.from_pretrained(**source)
        tokenizer = _without_extra_tokens(AutoTokenizer.from_pretrained(**source), config.vocab_size)
        loaded, found = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # what its readers make of a damaged file is of any kind
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path} must be a GGUF file that transformers can dequantise, got {said}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        name = type(loaded).__name__
        raise ValueError(f"{path} must hold every weight of {name}, got none for {missing[0]}, one of {len(missing)}")
    # a model of its own, for transformers takes the one that it read for quantised, and would not save it
    plain = type(loaded).from_pretrained(None, config=config, state_dict=loaded.state_dict(), dtype=torch.float32)
    return plain, tokenizer


def _without_extra_tokens(tokenizer: PreTrainedTokenizerBase, num_ids: int) -> PreTrainedTokenizerBase:
    """transformers adds an <|endoftext|> to a byte-level vocabulary that has none, and no model embeds it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < num_ids]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer
