"""A policy makes the logits that its model makes, and an adapter around it is trained."""

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

from qrm_fast import pack, policy_loss
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rollout import TransformersEngine
from qrm_fast.rl.tokenizers import load_tokenizer

SEQUENCES = [[2, 3, 4, 5, 1], [6, 7, 8, 9, 10, 11, 1], [3, 4, 1], [12, 13, 14, 1]]
PROMPT_LENS = [2, 3, 1, 2]
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
IDS = dict(vocab_size=18, pad_token_id=0, eos_token_id=1, bos_token_id=1)
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
    policy = Policy(load_policy(str(tmp_path), tokenizer))
    rollout = TransformersEngine(policy, [1]).generate([[2, 3]], max_new_tokens=6, temperature=0.7, seed=0)
    [response], [sampled] = rollout.responses, rollout.logprobs
    row = [2, 3, *response]
    logits = model.eval()(torch.tensor([row])).logits[0, 1:-1].float()
    expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)
    ours = policy(pack([row], [2]), temperature=0.7).logprobs
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def small_policy(std=0.3):
    torch.manual_seed(0)
    model = load_policy("scratch:demo", load_tokenizer("arithmetic"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


@pytest.mark.parametrize("kind", ["reinforce", "gspo"])
def test_the_loss_is_policy_loss_of_the_forward(kind):
    policy, batch = Policy(small_policy()), pack(SEQUENCES, PROMPT_LENS)
    num_actions = len(batch.action_index)
    advantages, old = torch.randn(num_actions), torch.full((num_actions,), -2.5)
    new = policy(batch, temperature=0.7)
    cu_seqlens = batch.action_cu_seqlens if kind == "gspo" else None
    options = dict(kind=kind, old_logprobs=old, entropy_coef=0.1)
    want = policy_loss(new.logprobs, advantages, entropy=new.entropy, cu_seqlens=cu_seqlens, **options).loss
    want_gradients = torch.autograd.grad(want, list(policy.parameters()))
    got = policy.loss(batch, advantages, temperature=0.7, **options).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, list(policy.parameters())), want_gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_a_policy_with_adapters_trains_and_its_weights_stay():
    peft = pytest.importorskip("peft")
    model = small_policy(0.1)
    frozen = {id(p): p.detach().clone() for p in model.parameters()}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    policy, batch = Policy(peft.get_peft_model(model, lora)).train(), pack(SEQUENCES, PROMPT_LENS)
    with policy.model.disable_adapter(), torch.no_grad():
        plain = policy(batch).logprobs
    assert (policy(batch).logprobs - plain).abs().max() > 1e-2  # the adapters are in the forward pass
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = AdamW(trained.values())
    losses = []
    for _ in range(2):
        loss = policy.loss(batch, torch.ones(len(batch.action_index)), kind="reinforce").loss
        loss.backward()
        optimizer.step(1e-3, 1.0)
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())
    kept = [p for p in policy.parameters() if id(p) in frozen]
    assert len(kept) == len(frozen) and all(torch.equal(p, frozen[id(p)]) for p in kept)


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="must be one linear layer, without an adapter of its own, got Linear"):
        Policy(peft.get_peft_model(small_policy(), lora))


def test_logits_made_in_another_way_are_refused(monkeypatch):
    forward = LlamaForCausalLM.forward

    def squared(self, **inputs):
        out = forward(self, **inputs)
        out.logits = out.logits * out.logits.abs()
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    with pytest.raises(ValueError, match=r"the logits of LlamaForCausalLM must be its head's, .* differ by"):
        load_policy("scratch:demo", load_tokenizer("arithmetic"))
