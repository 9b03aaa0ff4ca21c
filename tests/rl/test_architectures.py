"""Which causal language models are taken: small ones with random weights against transformers' plain forward.

`python tests/rl/test_architectures.py` writes the table into docs/training.md.
"""

import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qrm_fast import pack
from qrm_fast.rl.attention import check_packing, shares_prompts
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.models import check_context, load_policy, load_q_rm, load_token_model
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rollout import TransformersEngine, check_sampling
from qrm_fast.rl.tokenizers import load_tokenizer

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(head_dim=8, vocab_size=18, pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=128)
WINDOW = dict(sliding_window=4)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
BOTH_LAYERS = dict(layer_types=["sliding_attention", "full_attention"])
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8)
LATENT |= dict(num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
LINEAR |= dict(layer_types=["linear_attention", "full_attention"])
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_d_ssm=64, mamba_chunk_size=8)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)

# Name in the table -> model type, what differs from SIZES.
FAMILIES = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", WINDOW),
    "Ministral": ("ministral", WINDOW | BOTH_LAYERS),
    "Mixtral": ("mixtral", EXPERTS | WINDOW),
    "Qwen2": ("qwen2", {}),
    "Qwen2 with a window": ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "Qwen2.5-VL as text": ("qwen2_5_vl", MROPE),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Qwen3-VL as text": ("qwen3_vl", MROPE),
    "Qwen3-Next": ("qwen3_next", EXPERTS | LINEAR | dict(shared_expert_intermediate_size=32)),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", WINDOW | dict(query_pre_attn_scalar=8, attn_logit_softcapping=2.0)),
    "Gemma 3": ("gemma3_text", WINDOW | BOTH_LAYERS | dict(query_pre_attn_scalar=8)),
    "Gemma 3 with images as text": ("gemma3", WINDOW | BOTH_LAYERS | dict(query_pre_attn_scalar=8)),
    "Phi": ("phi", {}),
    "Phi-3, Phi-4": ("phi3", WINDOW),
    "Phi-3 with LongRoPE": ("phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=24)),
    "the same, past its original positions": (
        "phi3",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=16),
    ),
    "GPT-2": ("gpt2", GPT2),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "GPT-J": ("gptj", GPT2 | dict(rotary_dim=4)),
    "GPT-BigCode": ("gpt_bigcode", GPT2),
    "gpt-oss": ("gpt_oss", EXPERTS | WINDOW | BOTH_LAYERS),
    "OPT": ("opt", dict(ffn_dim=64, word_embed_proj_dim=32)),
    "BLOOM": ("bloom", dict(n_layer=2, n_head=4)),
    "Falcon": ("falcon", dict(head_dim=None, new_decoder_architecture=True, num_kv_heads=2)),
    "Falcon-H1": ("falcon_h1", MAMBA),
    "MPT": ("mpt", dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128)),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW | BOTH_LAYERS),
    "OLMoE": ("olmoe", EXPERTS),
    "Granite": ("granite", dict(logits_scaling=8.0)),
    "Granite-MoE": ("granitemoe", EXPERTS | dict(logits_scaling=8.0)),
    "Granite 4 (hybrid)": ("granitemoehybrid", EXPERTS | MAMBA | dict(layer_types=["mamba", "attention"])),
    "Cohere": ("cohere", dict(logit_scale=0.0625)),
    "Cohere 2": ("cohere2", WINDOW | BOTH_LAYERS | dict(logit_scale=0.0625)),
    "StarCoder2": ("starcoder2", WINDOW),
    "StableLM": ("stablelm", {}),
    "SmolLM3": ("smollm3", {}),
    "GLM": ("glm", {}),
    "GLM-4": ("glm4", {}),
    "GLM-4.5": ("glm4_moe", EXPERTS | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)),
    "EXAONE 4": ("exaone4", WINDOW | BOTH_LAYERS),
    "Nemotron": ("nemotron", {}),
    "DeepSeek-V3": ("deepseek_v3", EXPERTS | LATENT),
    "Llama 4 within its chunks": ("llama4_text", EXPERTS | dict(intermediate_size_mlp=64, attention_chunk_size=24)),
    "Llama 4 past its chunks": ("llama4_text", EXPERTS | dict(intermediate_size_mlp=64, attention_chunk_size=8)),
    "LFM2": ("lfm2", dict(layer_types=["conv", "full_attention"])),
    "Mamba": ("mamba", dict(state_size=8)),
    "Mamba-2": ("mamba2", dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8)),
    "Jamba": ("jamba", EXPERTS | dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)),
    "Bamba": ("bamba", MAMBA | dict(attn_layer_indices=[1])),
    "RecurrentGemma": ("recurrent_gemma", dict(attention_window_size=4, block_types=["recurrent", "attention"])),
    "Helium": ("helium", {}),
    "Seed-OSS": ("seed_oss", {}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Hunyuan": ("hunyuan_v1_dense", {}),
    "CodeGen": ("codegen", GPT2 | dict(rotary_dim=4)),
    "XGLM": ("xglm", dict(d_model=32, ffn_dim=64, attention_heads=4, num_layers=2)),
}
IMAGES = {
    "gemma3": dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    ),
    "qwen2_5_vl": dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=16, out_hidden_size=32),
    "qwen3_vl": dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=16, out_hidden_size=32),
}


# What is refused, and how the sentence begins.
LEAKS = "{}ForCausalLM must compute packed sequences as it does each alone"
OWN = "{} cannot be trained on packed sequences: its code takes no attention but its own"
REFUSED = {
    "Qwen3-Next": OWN.format("Qwen3NextForCausalLM"),
    "the same, past its original positions": "the longest sequence must fit the 16 positions of Phi3ForCausalLM",
    "GPT-J": OWN.format("the model"),
    "BLOOM": OWN.format("BloomForCausalLM"),
    "Falcon": OWN.format("the model"),
    "Falcon-H1": LEAKS.format("FalconH1"),
    "MPT": OWN.format("MptForCausalLM"),
    "Granite 4 (hybrid)": LEAKS.format("GraniteMoeHybrid"),
    "Llama 4 past its chunks": LEAKS.format("Llama4"),
    "LFM2": LEAKS.format("Lfm2"),
    "Mamba": OWN.format("MambaForCausalLM"),
    "Mamba-2": LEAKS.format("Mamba2"),
    "Jamba": LEAKS.format("Jamba"),
    "Bamba": LEAKS.format("Bamba"),
    "RecurrentGemma": "the logits of RecurrentGemmaForCausalLM must be its head's",
    "CodeGen": LEAKS.format("CodeGen"),
    "XGLM": LEAKS.format("XGLM"),
}
# Families whose policies are taken, but no scalar head on them, and how the sentence begins.
HEADLESS = {"Llama 4 within its chunks": "the model cannot be trained on packed sequences: its code fails"}


class Outcome(NamedTuple):
    difference: float | None  # largest of a log-probability, scored or sampled, to the plain forward; None: refused
    refusal: str
    shares: bool  # whether answers share the rows of their prompt
    head: str  # "" where the policy is refused, or a scalar head trains and loads again, else why not


def build(name):
    """A model of the family `name` with random weights."""
    kind, options = FAMILIES[name]
    sizes = SIZES | options
    if kind in IMAGES:
        config = AutoConfig.for_model(kind, text_config=sizes, vision_config=IMAGES[kind], pad_token_id=0)
        make = AutoModelForImageTextToText.from_config
    else:
        config = AutoConfig.for_model(kind, **{key: x for key, x in sizes.items() if x is not None})
        make = AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    model = make(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def refusal(error, directory):
    """The sentence up to its figures."""
    said = str(error).replace(str(directory), "the model")
    said = said.partition(" (")[0]  # what transformers says of its own code
    return said.partition(", got hidden states that differ")[0].partition(", got logits that differ")[0]


@torch.no_grad()
def measure(name, directory):
    """What the library does with the family `name`: an Outcome."""
    tokenizer = load_tokenizer("arithmetic")
    model = build(name)
    save_checkpoint(model, tokenizer, directory)
    try:
        policy = Policy(load_policy(str(directory), tokenizer))
        check_context(policy.model, 24)
        check_packing(policy.model, 24)
        engine = TransformersEngine(policy, [1])
        check_sampling(engine, policy, 24)
    except ValueError as error:
        return Outcome(None, refusal(error, directory), False, "")
    shares = shares_prompts(policy.model, 24)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, 17, (n,), generator=generator).tolist() for n in (20, 3)]
    rollout = engine.generate(prompts, num_samples=1, max_new_tokens=4, temperature=1.0, seed=0)
    fixed = TransformersEngine(policy, [1], fixed=True)
    same = fixed.generate(prompts, num_samples=1, max_new_tokens=4, temperature=1.0, seed=0)
    assert same.responses == rollout.responses
    torch.testing.assert_close(torch.cat(same.logprobs), torch.cat(rollout.logprobs), rtol=0, atol=1e-4)
    rows = [prompt + response for prompt, response in zip(prompts, rollout.responses, strict=True)]
    trained = policy(pack(rows, list(map(len, prompts)))).logprobs.split(list(map(len, rollout.responses)))
    model.set_attn_implementation("eager")
    difference = 0.0
    for prompt, response, *ours in zip(prompts, rollout.responses, rollout.logprobs, trained, strict=True):
        row = torch.tensor([prompt + response])
        text = {"token_type_ids": row * 0} if FAMILIES[name][0] == "gemma3" else {}
        logits = model(input_ids=row, use_cache=False, **text).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        difference = max(difference, *((x - expected).abs().max().item() for x in ours))
    try:
        save_checkpoint(load_token_model(str(directory), tokenizer), tokenizer, directory)
        check_packing(load_q_rm(str(directory), tokenizer), 24)
    except ValueError as error:
        return Outcome(difference, "", shares, refusal(error, directory))
    return Outcome(difference, "", shares, "")


@pytest.fixture(scope="module")
def outcomes():
    return {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_right_or_refused_in_a_sentence(name, outcomes, tmp_path):
    outcomes[name] = outcome = measure(name, tmp_path)
    if name in REFUSED:
        assert outcome.refusal.startswith(REFUSED[name])
    else:
        assert outcome.refusal == "" and outcome.difference <= BOUND and outcome.shares
        assert outcome.head.startswith(HEADLESS[name]) if name in HEADLESS else outcome.head == ""


def test_the_table_of_the_document_is_what_was_measured(outcomes):
    if len(outcomes) < len(FAMILIES):
        pytest.skip("not all families were measured")
    text = PAGE.read_text()
    assert with_table(text, outcomes) == text


BOUND = 1e-4
BEGIN, END = "<!-- architectures: python tests/rl/test_architectures.py -->\n", "<!-- end -->\n"
PAGE = Path(__file__).parents[2] / "docs/training.md"


def with_table(text, outcomes):
    """`text` with a table of `outcomes` between the marks."""
    lines = ["| family | policy: log-probabilities against transformers | Q-RM, critic |", "|---|---|---|"]
    for name, (difference, why, shares, head) in outcomes.items():
        if difference is None:
            lines.append(f"| {name} | refused: {why} | |")
        else:
            assert difference <= BOUND and shares, name
            lines.append(f"| {name} | <= {BOUND} | {f'refused: {head}' if head else 'works'} |")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2]


def render():
    warnings.simplefilter("ignore")
    outcomes = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            outcomes[name] = measure(name, directory)
    PAGE.write_text(with_table(PAGE.read_text(), outcomes))


if __name__ == "__main__":
    render()
