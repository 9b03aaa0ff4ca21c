"""GGUF files as models: weights, tokenizer, one checkpoint of each, bad files; the scripts of docs/real-model.md."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qrm_fast import pack
from qrm_fast.cli import main
from qrm_fast.rl import gguf as page
from qrm_fast.rl.attention import packed_hidden
from qrm_fast.rl.data import Example, Pair, read_rows, write_jsonl
from qrm_fast.rl.gguf import checkpoint_of
from qrm_fast.rl.models import load_policy, load_q_rm
from qrm_fast.rl.tokenizers import adapter_base, encode_prompt, load_stop_ids, load_tokenizer

gguf = pytest.importorskip("gguf")

EXAMPLES = Path(__file__).parents[2] / "examples"

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "a"), ("d", "d"), ("a", "dd"), ("Ġ", "add")]
TOKENS = ["<unk>", "<|user|>", "<|assistant|>", "<eos>", *BYTES, *map("".join, MERGES)]
NUM_CONTROL = 4
NUM_HEADS, NUM_KV_HEADS = 4, 2
CONFIG = dict(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=NUM_HEADS,
    num_key_value_heads=NUM_KV_HEADS,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=50_000.0,
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
QUANTISED = [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1]
F32 = gguf.GGMLQuantizationType.F32


def in_gguf(name, weight):
    """Name and layout of a weight in llama.cpp, which turns pairs of neighbouring elements, not of halves."""
    for theirs, heads in (("q_proj", NUM_HEADS), ("k_proj", NUM_KV_HEADS)):
        if theirs in name:
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    stem = name.removesuffix(".weight")
    if stem in OTHERS:
        return f"{OTHERS[stem]}.weight", weight
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight", weight


def write_gguf(path, kind=F32, *, architecture="llama", without="", tied=False):
    """A GGUF file of a random model; the model with the weights that the file holds."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=tied)).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * NUM_CONTROL + [gguf.TokenType.NORMAL] * (len(TOKENS) - NUM_CONTROL)
    )
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_eos_token_id(TOKENS.index("<eos>"))
    writer.add_pad_token_id(TOKENS.index("<unk>"))
    writer.add_chat_template(TEMPLATE)
    held = model.state_dict()
    for name, weight in held.items():
        theirs, values = in_gguf(name, weight.numpy())
        if theirs == without or (tied and theirs == "output.weight"):
            continue
        if weight.ndim == 2 and kind is not F32:
            values = gguf.quantize(values, kind)
            # a block has one scale for 32 neighbours of a row, and rows are what the layout moves: so as stored
            held[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
            writer.add_tensor(theirs, values, raw_dtype=kind)
        else:
            writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(held)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


def logits_of(policy, rows):
    with torch.no_grad():
        return policy.lm_head(packed_hidden(policy, pack(rows, [1] * len(rows))))


@pytest.mark.parametrize("kind", [F32, *QUANTISED], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [False, True])
def test_the_policy_has_the_logits_of_the_source(path, kind, tied):
    source = write_gguf(path, kind, tied=tied)
    with pytest.warns(UserWarning, match=r"tiny.gguf is dequantised, once, to .*tiny.dequantised"):
        tokenizer = load_tokenizer(str(path))
    policy = load_policy(str(path), tokenizer)
    for name, weight in source.state_dict().items():
        assert torch.equal(policy.state_dict()[name], weight), name
    rows = [[5, 9, 40, 7], [11, 30]]
    with torch.no_grad():
        expected = torch.cat([source(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(logits_of(policy, rows), expected, rtol=0, atol=1e-5)
    assert policy.config.tie_word_embeddings == tied
    # and the checkpoint is an ordinary one
    plain = AutoModelForCausalLM.from_pretrained(path.with_suffix(".dequantised"))
    assert torch.equal(plain(torch.tensor(rows[:1])).logits, source(torch.tensor(rows[:1])).logits)


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_the_tokenizer_is_the_one_of_the_file(path):
    write_gguf(path)
    tokenizer = load_tokenizer(str(path))
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = PreTrainedTokenizerFast(tokenizer_object=backend)
    for text in ("add 12 and 3", " added\n\n", "größer"):
        assert tokenizer(text).input_ids == expected(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert load_stop_ids(str(path), tokenizer) == [TOKENS.index("<eos>")]
    user, eos, assistant = (TOKENS.index(token) for token in ("<|user|>", "<eos>", "<|assistant|>"))
    assert encode_prompt(tokenizer, "add") == [user, *expected("add").input_ids, eos, assistant]


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_it_is_dequantised_once_and_needs_no_package_then(path, monkeypatch):
    write_gguf(path)
    made = checkpoint_of(str(path))
    assert made == str(path.with_suffix(".dequantised"))
    before = os.stat(f"{made}/model.safetensors").st_mtime_ns
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    assert checkpoint_of(str(path)) == made
    assert os.stat(f"{made}/model.safetensors").st_mtime_ns == before
    assert sorted(os.listdir(path.parent)) == ["tiny.dequantised", "tiny.gguf"]


@pytest.mark.parametrize("spec", ["scratch:demo", "owner/name-GGUF", "some/folder"])
def test_every_other_model_stays_what_it_is(spec):
    assert checkpoint_of(spec) == spec


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_commands_take_the_file(path, tmp_path, capsys):
    write_gguf(path)
    write_jsonl(tmp_path / "pairs.jsonl", [Pair(f"add {i}", f"{i}", f"{i}0") for i in range(8)])
    options = ["--data", str(tmp_path / "pairs.jsonl"), "--heldout", "0.25", "--batch_size", "4"]
    assert main(["train-rm", "--model", str(path), *options, "--out", str(tmp_path / "q_rm")]) == 0
    load_q_rm(str(tmp_path / "q_rm"), load_tokenizer(str(path)))
    # as a Q-RM the file itself has no head
    assert main(["score", "--model", str(path), "--prompt", "add 1", "--response", "1"]) == 2
    assert "a token classifier with one label, got LlamaForCausalLM" in capsys.readouterr().err
    assert main(["merge", "--model", str(path), "--out", str(tmp_path / "merged")]) == 2
    assert "must be an adapter, got a model that has none to merge" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_an_adapter_names_the_checkpoint_which_plain_peft_can_load(path, tmp_path):
    pytest.importorskip("peft")
    write_gguf(path)
    write_jsonl(tmp_path / "pairs.jsonl", [Pair(f"add {i}", f"{i}", f"{i}0") for i in range(8)])
    options = ["--data", str(tmp_path / "pairs.jsonl"), "--heldout", "0.25", "--batch_size", "4", "--lora_rank", "2"]
    assert main(["train-rm", "--model", str(path), *options, "--out", str(tmp_path / "q_rm")]) == 0
    assert adapter_base(str(tmp_path / "q_rm")) == str(path.with_suffix(".dequantised"))


def refused(path, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(path))
    assert os.listdir(path.parent) == [path.name]  # nothing is left beside it


def test_a_file_of_another_kind(path):
    path.write_bytes(b"PK\x03\x04 and more")
    refused(path, r"tiny.gguf must be a GGUF file, which begins with b'GGUF', got b'PK\\x03\\x04'")


def test_no_file(path):
    with pytest.raises(FileNotFoundError, match=r"tiny\.gguf"):
        load_policy(str(path), load_tokenizer("arithmetic"))


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_a_package_the_extra_is_named(path, monkeypatch, package):
    write_gguf(path)
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == package else True)
    refused(path, rf"tiny.gguf is a GGUF file, which needs the package {package}, pip install 'qrm_fast\[gguf\]'")


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_an_architecture_that_transformers_does_not_know(path):
    write_gguf(path, architecture="lama")
    refused(path, "tiny.gguf must be a GGUF file that transformers can dequantise, got ValueError: .*lama")


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_a_file_that_ends_early(path):
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "tiny.gguf must be a GGUF file that transformers can dequantise, got ")


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_a_file_without_one_weight(path):
    write_gguf(path, without="blk.1.ffn_up.weight")
    refused(
        path, r"must hold every weight of LlamaForCausalLM, got none for model.layers.1.mlp.up_proj.weight, one of 1"
    )


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_a_newer_file_is_not_taken_for_the_old_one(path):
    write_gguf(path)
    made = checkpoint_of(str(path))
    os.utime(path, (os.stat(made).st_mtime + 10,) * 2)
    with pytest.raises(ValueError, match=r"tiny.dequantised must be newer than .*tiny.gguf, which it was made of"):
        checkpoint_of(str(path))
    shutil.rmtree(made)
    assert checkpoint_of(str(path)) == made


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_packed_against_padded(path, tmp_path):
    write_gguf(path)
    answers = [f"{i} and {i * i}" for i in range(5)]
    write_jsonl(tmp_path / "pairs.jsonl", [Pair(f"add {x}", x, "") for x in answers])
    got = example("packed_against_padded").compare(str(path), tmp_path / "pairs.jsonl", num_answers=4, batch_size=3)
    tokenizer = load_tokenizer(str(path))
    lengths = [len(tokenizer(x).input_ids) + 1 for x in answers[:4]]  # and EOS
    prompts = [len(encode_prompt(tokenizer, f"add {x}")) for x in answers[:4]]
    both = [a + b for a, b in zip(prompts, lengths, strict=True)]
    assert got[:3] == (sum(both), 3 * max(both[:3]) + both[3], sum(lengths))
    assert got.mean <= got.largest < 1e-5


@pytest.mark.filterwarnings("ignore:.* is dequantised")
def test_worded_sums(path, tmp_path, monkeypatch):
    write_gguf(path)
    module = example("worded_sums")
    monkeypatch.setattr(module, "NUM_SAMPLED", 6)
    # a random model is never right: every answer with an even number of characters is
    monkeypatch.setattr(
        module, "verified", lambda _, k, rows, done, labels: torch.tensor([len(x) % 2 == 0 for x in rows]).float()
    )
    module.write(str(path), str(tmp_path / "sums"), max_new_tokens=24, dtype="float32")
    sides = [read_rows(tmp_path / "sums" / f"{name}.jsonl", Example) for name in ("prompts", "heldout")]
    sums = []
    for side in sides:
        found = [re.search(r" has (\d) \w+ and (buys|loses) (\d)", row.instruction[-1].content) for row in side]
        sums.append({(int(x[1]), x[2], int(x[3])) for x in found})
        results = [int(x[1]) + (int(x[3]) if x[2] == "buys" else -int(x[3])) for x in found]
        assert [row.label for row in side] == [str(x) for x in results] and min(results) > 0
    assert len(sums[0]) > 50 and len(sums[1]) > 10 and not sums[0] & sums[1]
