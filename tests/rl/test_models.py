"""Packed attention against one sequence at a time, the leak test seen red, checkpoints that plain transformers load."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from qrm_fast import pack
from qrm_fast.rl.attention import check_no_leak, packed_attention, packed_hidden
from qrm_fast.rl.models import check_context, load_policy, load_token_model, save_checkpoint
from qrm_fast.rl.tokenizers import check_same_vocabulary, load_tokenizer


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


def test_no_leak_in_ours_and_red_in_attention_that_ignores_the_boundaries(policy):
    check_no_leak(policy)

    def across(module, query, key, value, mask, *, scaling, **_):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    def backwards(module, query, key, value, mask, *, scaling, cu_seq_lens_q, **_):
        rows = torch.arange(query.shape[2])
        document = torch.bucketize(rows, cu_seq_lens_q, right=True)
        mask = document[:, None] == document
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("across", across)
    AttentionInterface.register("backwards", backwards)
    policy.set_attn_implementation("across")
    with pytest.raises(
        RuntimeError,
        match="not independent of the packing",
    ):
        check_no_leak(policy)
    policy.set_attn_implementation("backwards")
    with pytest.raises(RuntimeError, match="not causal: changing a token changed the hidden states before it"):
        check_no_leak(policy)


def test_packed_attention_refuses_what_it_does_not_compute():
    q = torch.zeros(1, 2, 4, 8)
    cu = torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"needs cu_seq_lens_q .* got neither"):
        packed_attention(None, q, q, q, None, scaling=1.0)
    for option in (dict(dropout=0.1), dict(softcap=30.0), dict(sliding_window=3), dict(s_aux=torch.ones(2))):
        with pytest.raises(ValueError, match="computes plain causal attention, expected dropout 0, no softcap"):
            packed_attention(None, q, q, q, None, scaling=1.0, cu_seq_lens_q=cu, max_length_q=4, **option)
    packed_attention(None, q, q, q, None, scaling=1.0, cu_seq_lens_q=cu, max_length_q=4, sliding_window=4)


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
    with pytest.raises(ValueError, match=r"small must embed the tokenizer's \d+ tokens, got 17"):
        load_policy(str(tmp_path / "small"), load_tokenizer("bpe", ["1+1"]))
    sizes = dict(vocab_size=17, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "dropout")
    with pytest.raises(ValueError, match=r"the dropout of .*dropout must be 0 in its configuration, got 0.1"):
        load_policy(str(tmp_path / "dropout"), tokenizer)
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"must keep its head in `score`, got GPT2ForTokenClassification"):
        load_token_model(str(tmp_path / "gpt2"), tokenizer)
    with pytest.raises(ValueError, match="must fit the 16 positions of GPT2LMHeadModel, got 17"):
        check_context(load_policy(str(tmp_path / "gpt2"), tokenizer), 17)
