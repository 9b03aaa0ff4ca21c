"""The examples of README run as they stand."""

import re
from pathlib import Path

import pytest
import torch

from qrm_fast import pack
from qrm_fast.rl.attention import packed_hidden
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.tokenizers import load_tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def example(name):
    return next(text for text in EXAMPLES if name in text)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("arithmetic")


def test_the_line_that_replaces_log_softmax_gives_the_same(tokenizer):
    torch.manual_seed(0)
    model = load_policy("scratch:demo", tokenizer).eval()
    model.set_attn_implementation("sdpa")
    old, new = example("log_softmax"), example("qrm_fast.linear_logprobs(hidden, model")
    input_ids = torch.randint(2, 17, (2, 9))
    targets = input_ids.roll(-1, 1)
    action_mask = torch.ones(2, 9, dtype=torch.bool)
    names = {"model": model, "input_ids": input_ids, "targets": targets, "temperature": 0.7}
    with torch.no_grad():
        exec(old, names)
        expected = names["logprobs"], names["entropy"]
        exec(new, names | {"action_mask": action_mask, "targets": targets[action_mask]}, got := {})
    for name, value in zip(("logprobs", "entropy"), expected, strict=True):
        torch.testing.assert_close(got[name], value[action_mask], rtol=1e-5, atol=1e-5)


def test_token_lists_to_an_update(tokenizer):
    torch.manual_seed(0)
    policy = load_policy("scratch:demo", tokenizer)
    sequences, prompt_lens = [[2, 3, 4, 5, 1], [6, 7, 8, 1]], [2, 1]
    names = {
        "torch": torch,
        "policy": policy,
        "q_rm": load_token_model("scratch:demo", tokenizer),
        "packed_hidden": packed_hidden,
        "sequences": sequences,
        "prompt_lens": prompt_lens,
        "sampled": torch.full((int(pack(sequences, prompt_lens).action_cu_seqlens[-1]),), -2.8),
    }
    exec("import qrm_fast\n" + example("qrm_fast.pack"), names)
    names["loss"].backward()
    assert policy.lm_head.weight.grad.abs().sum() > 0


def test_padded_batches_at_the_edge():
    response_mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    rewards, values = torch.randn(2, 3), torch.randn(2, 3)
    names = {"response_mask": response_mask, "rewards": rewards, "values": values}
    exec("import qrm_fast\n" + example("from_padded"), names)
    last = rewards[1, 2] - values[1, 2]
    torch.testing.assert_close(names["advantages"][1, 2], last)
    assert names["advantages"][0, 2] == 0
