"""Packed attention against one sequence at a time, the leak test seen red, checkpoints that plain transformers load."""

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from qrm_fast import pack
from qrm_fast.rl.attention import check_packing, packed_attention, packed_hidden
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.decoding import Step
from qrm_fast.rl.models import check_context, load_policy, load_q_rm, load_token_model
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rollout import TransformersEngine, check_sampling
from qrm_fast.rl.tokenizers import check_same_vocabulary, load_stop_ids, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("arithmetic")


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(0)
    return load_policy("scratch:demo", tokenizer)


def sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 17, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model, rows):
    """Hidden states of each sequence alone, through transformers' own attention."""
    model.set_attn_implementation("eager")
    hidden = torch.cat([model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows])
    model.set_attn_implementation("qrm_packed")
    return hidden


@pytest.mark.parametrize("lengths", [[1], [7], [3, 3, 3], [5, 1, 9, 9, 2], [64, 1, 33]])
def test_packed_forward_and_gradient_equal_one_by_one(policy, lengths):
    rows = sequences(lengths)
    packed = packed_hidden(policy, pack(rows, [1] * len(rows)))
    alone = one_by_one(policy, rows)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    upstream = torch.randn_like(packed)
    parameters = list(policy.base_model.parameters())
    ours = torch.autograd.grad(packed, parameters, upstream)
    theirs = torch.autograd.grad(alone, parameters, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-4


def test_packing_is_red_in_attention_that_ignores_boundaries_or_windows_or_looks_ahead(policy, saved, tokenizer):
    check_packing(policy, 24)
    assert policy.training is False and policy.config._attn_implementation == "qrm_packed"

    def across(module, query, key, value, mask, *, scaling, **_):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    def backwards(module, query, key, value, mask, *, scaling, cu_seq_lens_q, **_):
        rows = torch.arange(query.shape[2])
        document = torch.bucketize(rows, cu_seq_lens_q, right=True)
        mask = document[:, None] == document
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    def without_window(*inputs, sliding_window=None, **options):
        return packed_attention(*inputs, **options)

    mistral = load_policy(saved(small("mistral", sliding_window=4)), tokenizer)
    check_packing(mistral, 24)
    for broken, model in ((across, policy), (backwards, policy), (without_window, mistral)):
        AttentionInterface.register("qrm_packed", broken)
        try:
            with pytest.raises(ValueError, match=r"packed sequences as it does each alone, got .* differ by"):
                check_packing(model, 24)
        finally:
            AttentionInterface.register("qrm_packed", packed_attention)


def small(name, **options):
    """A model of the architecture `name` with random weights, saved with the arithmetic tokenizer."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    ids = dict(vocab_size=18, pad_token_id=0, bos_token_id=1, eos_token_id=1, num_key_value_heads=2)
    config = AutoConfig.for_model(name, **{**sizes, **ids, "max_position_embeddings": 128, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture
def saved(tokenizer, tmp_path):
    def save(model):
        save_checkpoint(model, tokenizer, tmp_path / "model")
        return str(tmp_path / "model")

    return save


WINDOWS = {
    "mistral": dict(sliding_window=4),
    "qwen2": dict(use_sliding_window=True, sliding_window=4, max_window_layers=0),
    "gemma3_text": dict(sliding_window=4, query_pre_attn_scalar=8),
    "gemma2": dict(sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gpt_oss": dict(sliding_window=4, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    "olmo3": dict(sliding_window=4),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_caps_sinks_and_experts_are_the_models_own(name, saved, tokenizer):
    """Scored, sampled and trained as transformers computes the same text, of 24 tokens with a window of 4."""
    model = small(name, **WINDOWS[name])
    policy = Policy(load_policy(saved(model), tokenizer))
    check_packing(policy.model, 24)
    engine = TransformersEngine(policy, [1])
    check_sampling(engine, policy, 24)
    prompts = [sequences([20], seed=1)[0], [5, 6, 7]]
    rollout = engine.generate(prompts, num_samples=1, max_new_tokens=4, temperature=1.0, seed=0)
    model.set_attn_implementation("eager")
    for prompt, response, sampled in zip(prompts, rollout.responses, rollout.logprobs, strict=True):
        row = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)
        trained = policy(pack([prompt + response], [len(prompt)])).logprobs
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4)


def test_sampling_from_another_distribution_is_refused(policy, monkeypatch):
    policy = Policy(policy)
    engine = TransformersEngine(policy, [1])
    check_sampling(engine, policy, 24)
    hidden = Step._hidden
    monkeypatch.setattr(Step, "_hidden", lambda self, *inputs: hidden(self, *inputs) * 1.1)
    with pytest.raises(ValueError, match="LlamaForCausalLM must be sampled from as it is trained, got"):
        check_sampling(engine, policy, 24)


@pytest.mark.parametrize(
    ("name", "options"), [("gptj", dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4)), ("falcon_h1", {})]
)
def test_an_architecture_that_leaks_or_cannot_be_packed_is_refused_in_a_sentence(name, options, saved, tokenizer):
    spec = saved(small(name, **options))
    with pytest.raises(ValueError, match=r"cannot be trained on packed sequences: |must compute packed"):
        check_packing(load_policy(spec, tokenizer), 24)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opt", dict(ffn_dim=64, word_embed_proj_dim=32, dropout=0.1)),
        ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)),
        ("llama", dict(attention_dropout=0.1)),
        ("mixtral", dict(num_local_experts=4, router_jitter_noise=0.1)),
    ],
)
def test_configured_dropout_is_switched_off_and_said(name, options, saved, tokenizer):
    spec = saved(small(name, **options))
    with pytest.warns(UserWarning, match=r"the dropout that .* configures is switched off: \w+ 0.1"):
        policy = load_policy(spec, tokenizer)
    check_packing(policy, 24)


def test_noise_that_no_configuration_names_is_refused(policy, monkeypatch):
    forward = type(policy.model.layers[0].mlp).forward
    noisy = lambda self, x: F.dropout(forward(self, x), 0.5, self.training)  # noqa: E731
    monkeypatch.setattr(type(policy.model.layers[0].mlp), "forward", noisy)
    with pytest.raises(ValueError, match="must compute the same twice in training mode"):
        check_packing(policy, 24)
    monkeypatch.setattr(
        type(policy.model.layers[0].mlp), "forward", lambda self, x: forward(self, x) * (2 - self.training)
    )
    with pytest.raises(ValueError, match="must compute in training mode what it does in evaluation mode"):
        check_packing(policy, 24)


def test_broken_weights_are_called_broken(policy):
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the hidden states of LlamaForCausalLM must be finite, got NaN or infinity"):
        check_packing(policy, 24)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "granite", "olmo2", "cohere", "gemma3_text"])
def test_a_scalar_head_on_a_family_without_one_loads_again(name, saved, tokenizer, tmp_path):
    options = dict(gpt2=dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0))
    model = small(name, **options.get(name, {}))
    q_rm = load_token_model(saved(model), tokenizer)
    for ours, theirs in zip(q_rm.base_model.parameters(), model.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    check_packing(q_rm, 24)
    save_checkpoint(q_rm, tokenizer, tmp_path / "q_rm")
    again = load_q_rm(str(tmp_path / "q_rm"), tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), q_rm.parameters(), strict=True))


def test_a_missing_weight_is_not_made_up(saved, tokenizer):
    spec = saved(small("llama"))
    weights = load_file(f"{spec}/model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, f"{spec}/model.safetensors", metadata={"format": "pt"})
    for load in (load_policy, load_token_model):
        with pytest.raises(
            ValueError, match=r"must hold every weight of Llama\w+, got none for model.layers.1.self_attn.k"
        ):
            load(spec, tokenizer)


def test_a_q_rm_that_lost_its_head_is_refused(tokenizer, saved):
    spec = saved(load_token_model("scratch:demo", tokenizer))
    weights = load_file(f"{spec}/model.safetensors")
    del weights["score.weight"]
    save_file(weights, f"{spec}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"every weight of LlamaForTokenClassification, got none for score\.weight"):
        load_q_rm(spec, tokenizer)


VISION = {
    "gemma3": dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    ),
    "qwen2_5_vl": dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=16, out_hidden_size=32),
    "qwen3_vl": dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=16, out_hidden_size=32),
}


@pytest.mark.parametrize("name", VISION)
def test_the_text_model_of_a_model_of_text_and_images(name, saved, tokenizer, tmp_path):
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    text |= dict(vocab_size=18, pad_token_id=0, bos_token_id=1, eos_token_id=1, num_key_value_heads=2)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    text |= dict(layer_types=2 * ["full_attention"]) if name == "gemma3" else dict(rope_parameters=rope)
    config = AutoConfig.for_model(name, text_config=text, vision_config=VISION[name], pad_token_id=0)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.2)
    row = torch.tensor(sequences([9]))
    with torch.no_grad():
        expected = whole(input_ids=row, **({"token_type_ids": row * 0} if name == "gemma3" else {})).logits
    spec = saved(whole)
    policy = load_policy(spec, tokenizer)
    check_packing(policy, 24)
    save_checkpoint(policy, tokenizer, tmp_path / "text")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(row).logits, expected, rtol=1e-4, atol=1e-4)
    save_checkpoint(load_token_model(spec, tokenizer), tokenizer, tmp_path / "q_rm")
    load_q_rm(str(tmp_path / "q_rm"), tokenizer)


def adapter(model, directory, base):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_is_merged_into_the_model_it_names(with_tokenizer, saved, tokenizer, tmp_path):
    base = saved(small("llama"))
    row = torch.tensor(sequences([9]))
    adapted = adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", base).eval()
    if with_tokenizer:
        tokenizer.save_pretrained(tmp_path / "adapter")
    spec = str(tmp_path / "adapter")
    assert load_tokenizer(spec).get_vocab() == tokenizer.get_vocab() and load_stop_ids(spec, tokenizer) == [1]
    policy = load_policy(spec, tokenizer)
    check_packing(policy, 24)
    assert all(p.requires_grad for p in policy.parameters())
    save_checkpoint(policy, tokenizer, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(row).logits, adapted(row).logits, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert (plain(row).logits - adapted(row).logits).abs().max() > 1e-2


def test_adapters_that_are_refused(saved, tokenizer, tmp_path, monkeypatch):
    base = saved(small("llama"))
    spec = str(tmp_path / "adapter")
    adapter(small("llama"), spec, base)
    with pytest.raises(ValueError, match=r"must be a Q-RM, a token classifier with one label, got LlamaForCausalLM"):
        load_q_rm(spec, tokenizer)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match="is an adapter, which needs the package peft"):
            load_policy(spec, tokenizer)
    adapter(small("llama"), spec, None)
    for load in (load_policy, load_token_model, load_stop_ids):
        with pytest.raises(ValueError, match="must name the model it belongs to, base_model_name_or_path, got None"):
            load(spec, tokenizer)


def test_long_rope_is_refused_past_its_original_positions(saved, tokenizer):
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    spec = saved(small("phi3", rope_parameters=rope, original_max_position_embeddings=16))
    model = load_policy(spec, tokenizer)
    check_context(model, 16)
    with pytest.raises(ValueError, match="must fit the 16 positions of Phi3ForCausalLM, got 17"):
        check_context(model, 17)


def test_ids_that_no_token_has_are_neither_sampled_nor_weighed(saved):
    tokenizer = load_tokenizer("arithmetic")  # 18 ids
    spec = saved(small("llama", vocab_size=64))
    policy = Policy(load_policy(spec, tokenizer), num_ids=18)
    rollout = TransformersEngine(policy, [1]).generate(
        [[3, 4]], num_samples=64, max_new_tokens=8, temperature=3.0, seed=0
    )
    assert max(map(max, rollout.responses)) < 18
    row = [3, 4, *rollout.responses[0]]
    with torch.no_grad():
        logits = policy.model(
            torch.tensor([row]), attention_mask=torch.ones(1, 1, len(row), len(row)).tril().bool()
        ).logits
    expected = logits[0, 1:-1, :18].log_softmax(-1).gather(1, torch.tensor(row[2:])[:, None])[:, 0]
    torch.testing.assert_close(policy(pack([row], [2])).logprobs, expected, rtol=1e-4, atol=1e-4)


def test_packed_attention_refuses_what_it_does_not_compute():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"needs cu_seq_lens_q .* got neither"):
        packed_attention(None, q, q, q, None, scaling=1.0)
    with pytest.raises(ValueError, match=r"packed attention has no dropout, expected 0, got 0\.1"):
        packed_attention(None, q, q, q, None, scaling=1.0, cu_seq_lens_q=torch.tensor([0, 4]), dropout=0.1)


def test_checkpoints_load_in_plain_transformers_with_the_same_numbers(policy, tokenizer, tmp_path):
    q_rm = load_token_model("scratch:demo", tokenizer)
    assert q_rm.score.bias is None and q_rm.score.weight.shape == (1, 128)
    save_checkpoint(policy, tokenizer, tmp_path / "policy")
    save_checkpoint(q_rm, tokenizer, tmp_path / "q_rm")
    assert (tmp_path / "policy" / "model.safetensors").exists()

    [row] = sequences([9])
    batch = pack([row], [1])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    expected = F.linear(packed_hidden(policy, batch), policy.lm_head.weight)
    torch.testing.assert_close(plain(torch.tensor([row])).logits[0], expected, rtol=0, atol=1e-4)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "q_rm").eval()
    assert plain.config.num_labels == 1
    expected = packed_hidden(q_rm, batch) @ q_rm.score.weight[0]
    torch.testing.assert_close(plain(torch.tensor([row])).logits[0, :, 0], expected, rtol=0, atol=1e-4)

    loaded = AutoTokenizer.from_pretrained(tmp_path / "policy")
    check_same_vocabulary(loaded, tokenizer)
    text = "07+6=13\n\n#13"
    assert loaded(text).input_ids == tokenizer(text).input_ids and loaded.decode(loaded(text).input_ids) == text


def test_q_rm_starts_from_a_policy_checkpoint_and_keeps_a_trained_head(policy, tokenizer, tmp_path):
    save_checkpoint(policy, tokenizer, tmp_path / "policy")
    q_rm = load_token_model(str(tmp_path / "policy"), tokenizer)
    assert q_rm.score.bias is None
    for ours, theirs in zip(q_rm.base_model.parameters(), policy.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    save_checkpoint(q_rm, tokenizer, tmp_path / "q_rm")
    assert torch.equal(load_token_model(str(tmp_path / "q_rm"), tokenizer).score.weight, q_rm.score.weight)


def test_bad_specs(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"model must be one of scratch:demo, scratch:small or .* got scratch:tiny"):
        load_policy("scratch:tiny", tokenizer)
    with pytest.raises(OSError, match="missing"):
        load_policy(str(tmp_path / "missing"), tokenizer)
    save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, tmp_path / "small")
    with pytest.raises(ValueError, match=r"small must embed the tokenizer's \d+ tokens, got 18"):
        load_policy(str(tmp_path / "small"), load_tokenizer("bpe", ["1+1"]))
    config = GPT2Config(vocab_size=18, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="must fit the 16 positions of GPT2LMHeadModel, got 17"):
        check_context(load_policy(str(tmp_path / "gpt2"), tokenizer), 17)
