"""Advantages of tokens over what the policy might have written, against plain transformers, token by token."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from qrm_fast.rl import choices
from qrm_fast.rl.arithmetic import arithmetic_tokenizer
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.choices import choice_advantages
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.tokenizers import encode_prompt, encode_response

TOKENIZER = arithmetic_tokenizer()


@pytest.mark.parametrize("likely", [0.0, 0.058, 1.0])
def test_advantages_are_over_the_expected_q_of_likely_tokens(tmp_path, monkeypatch, likely):
    monkeypatch.setattr(choices, "LIKELY", likely)
    monkeypatch.setattr(choices, "NUM_SEQUENCES", 7)
    torch.manual_seed(0)
    save_checkpoint(load_policy("scratch:demo", TOKENIZER), TOKENIZER, tmp_path / "policy")
    save_checkpoint(load_token_model("scratch:demo", TOKENIZER), TOKENIZER, tmp_path / "q_rm")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    q_rm = AutoModelForTokenClassification.from_pretrained(tmp_path / "q_rm")

    answers = [("7+6:", "07+6=13"), ("1+2+3:", "")]
    results = choice_advantages(f"{tmp_path}/policy", f"{tmp_path}/q_rm", answers)
    for (prompt, text), (tokens, advantages) in zip(answers, results, strict=True):
        state = encode_prompt(TOKENIZER, prompt)
        assert tokens == [*text, "<eos>"]
        for token, advantage in zip(encode_response(TOKENIZER, text), advantages, strict=True):
            with torch.no_grad():
                p = policy(torch.tensor([state])).logits[0, -1].softmax(-1)
                q = q_rm(torch.tensor([[*state, a] for a in range(len(p))])).logits[:, -1, 0]
            p = torch.where((p >= likely) | (torch.arange(len(p)) == token), p, 0.0)
            assert advantage == pytest.approx((q[token] - p @ q / p.sum()).item(), abs=1e-4)
            assert (advantage == 0) == (likely == 1.0)
            state.append(token)
