"""What the tests of the loop begin with."""

import pytest
import torch

from qrm_fast.rl.arithmetic import arithmetic_examples
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.data import STEP, write_jsonl
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A fresh policy, a fresh Q-RM, a fresh PRM, two fresh models with a head of Q-values, and 16 prompts."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, folder / "policy")
    save_checkpoint(load_token_model("scratch:demo", tokenizer), tokenizer, folder / "q_rm")
    prm = load_token_model("scratch:demo", tokenizer, num_labels=2)
    prm.config.step_separator = STEP
    save_checkpoint(prm, tokenizer, folder / "prm")
    q_model = load_policy("scratch:demo", tokenizer)
    q_model.config.reward_model = "qrm-vocab"
    save_checkpoint(q_model, tokenizer, folder / "q_vocab")
    q_model.config.reference_model, q_model.config.implicit_beta = str(folder / "policy"), 0.1
    save_checkpoint(q_model, tokenizer, folder / "implicit")
    write_jsonl(folder / "prompts.jsonl", arithmetic_examples(16, split="train", seed=0))
    return folder
