"""A policy's head makes the logits that the model itself makes, whatever its architecture adds to them."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from qrm_fast import pack
from qrm_fast.rl.attention import packed_hidden
from qrm_fast.rl.models import load_policy, save_checkpoint
from qrm_fast.rl.policy import policy_head
from qrm_fast.rl.rollout import TransformersEngine
from qrm_fast.rl.tokenizers import load_tokenizer

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
IDS = dict(vocab_size=17, pad_token_id=0, eos_token_id=1, bos_token_id=1)
MODELS = {
    "granite": (GraniteForCausalLM, GraniteConfig(**SIZES, **IDS, logits_scaling=8.0)),
    "cohere": (CohereForCausalLM, CohereConfig(**SIZES, **IDS, logit_scale=0.0625)),
    "phi": (PhiForCausalLM, PhiConfig(**SIZES, **IDS, resid_pdrop=0.0)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, **IDS, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_loop_and_sampler_agree_with_the_model(name, tmp_path):
    build, config = MODELS[name]
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    model = build(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_checkpoint(model, tokenizer, tmp_path)
    policy = load_policy(str(tmp_path), tokenizer)
    engine, generator = TransformersEngine(policy, 1), torch.Generator().manual_seed(0)
    rollout = engine.generate([[2, 3]], max_new_tokens=6, temperature=0.7, generator=generator)
    [response], [sampled] = rollout.responses, rollout.logprobs
    row = [2, 3, *response]
    logits = model.eval()(torch.tensor([row])).logits[0, 1:-1].float()
    expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)
    batch = pack([row], [2])
    hidden, targets = packed_hidden(policy, batch)[batch.action_index], batch.targets[batch.action_index]
    ours = policy_head(policy).logprobs(hidden, targets, temperature=0.7).logprobs
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_logits_made_in_another_way_are_refused(monkeypatch):
    forward = LlamaForCausalLM.forward

    def squared(self, **inputs):
        out = forward(self, **inputs)
        out.logits = out.logits * out.logits.abs()
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    with pytest.raises(ValueError, match=r"the logits of LlamaForCausalLM must be its head's, .* differ by"):
        load_policy("scratch:demo", load_tokenizer("arithmetic"))
