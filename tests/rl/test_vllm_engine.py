"""What the engine tells vLLM and takes from it, with a stand-in for it; `make test-vllm` runs the real one."""

import sys
from random import Random
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qrm_fast.rl.lora import merged_weights
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.tokenizers import load_tokenizer
from qrm_fast.rl.vllm_engine import VLLMEngine

NUM_IDS = 15  # of the 18 that the model embeds


class LLM:
    """Answers every prompt with its seed's tokens, and writes down what it is told."""

    def __init__(self, folder, **options):
        self.options, self.calls, self.weights = options, [], {}

    def apply_model(self, function):
        return [["lm_head.weight"]]

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.weights = {name: x.clone() for name, x in kwargs["weights_iterator"]}
        self.calls.append("reload")

    def wake_up(self):
        self.calls.append("wake up")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, requests, options, use_tqdm):
        self.calls.append("generate")
        self.requests, self.asked = [x["prompt_token_ids"] for x in requests], options
        return [self.answer(Random(x.seed), x) for x in options]

    def answer(self, draw, options):
        tokens = [draw.randrange(2, NUM_IDS) for _ in range(draw.randrange(options.max_tokens))] + [1]
        logprobs = SimpleNamespace(logprobs=[-x / 8 for x in tokens])
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens), logprobs=logprobs)])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_policy("scratch:demo", load_tokenizer("arithmetic"))


@pytest.fixture
def engine(model, monkeypatch):
    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return VLLMEngine(Policy(model, num_ids=NUM_IDS), [1, 5], max_len=20, cache_gib=0.5)


def generate(engine, **options):
    asked = dict(num_samples=2, max_new_tokens=6, temperature=0.7, seed=3) | options
    return engine.generate([[3], [4, 6]], **asked)


def test_the_distribution_is_the_policys(engine):
    options = engine.llm.options
    assert options["hf_overrides"] == {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": NUM_IDS,
        "head_dtype": "float32",
    }
    assert (options["dtype"], options["max_model_len"], options["kv_cache_memory_bytes"]) == ("float32", 20, 2**29)
    assert options["logprobs_mode"] == "processed_logprobs" and options["generation_config"] == "vllm"
    rollout = generate(engine)
    assert engine.llm.requests == [[3], [3], [4, 6], [4, 6]]
    for asked in engine.llm.asked:
        assert vars(asked).keys().isdisjoint({"top_p", "top_k", "min_p"})
        assert (asked.temperature, asked.max_tokens, asked.stop_token_ids, asked.logprobs) == (0.7, 6, [1, 5], 0)
    assert len({asked.seed for asked in engine.llm.asked}) == 4
    assert rollout.finished == [True] * 4 and all(response[-1] == 1 for response in rollout.responses)
    for response, logprobs in zip(rollout.responses, rollout.logprobs, strict=True):
        assert torch.equal(logprobs, torch.tensor(response) / -8)


def test_seeds_tell_answers_and_calls_apart(engine):
    first, again, other = (generate(engine, seed=seed).responses for seed in (3, 3, 4))
    assert first == again != other and first[0] != first[1]


def test_greedy_answers_have_log_probability_0(engine):
    rollout = generate(engine, temperature=0)
    assert (torch.cat(rollout.logprobs) == 0).all() and engine.llm.asked[0].temperature == 0


def test_an_answer_that_is_cut_is_not_finished(engine, monkeypatch):
    one = SimpleNamespace(token_ids=(2, 3), logprobs=SimpleNamespace(logprobs=[-1.0, -2.0]))
    monkeypatch.setattr(LLM, "answer", lambda *_: SimpleNamespace(outputs=[one]))
    assert generate(engine, max_new_tokens=2).finished == [False] * 4
    one.logprobs.logprobs = [-1.0, float("nan")]
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match=r"sampling from LlamaForCausalLM gave .* that are not finite"):
            generate(engine, max_new_tokens=2, temperature=temperature)


def test_weights_are_read_once_after_a_sync(engine, model):
    assert engine.llm.calls == ["reload"]
    for _ in range(2):
        generate(engine)
    engine.sync(engine.policy)
    generate(engine)
    assert engine.llm.calls == ["reload", *["reset", "generate"] * 2, "reload", "reset", "generate"]
    expected = dict(model.state_dict())
    assert engine.llm.weights.keys() == expected.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(expected[name]) == 18
        expected[name] = expected[name][:NUM_IDS]
    assert all(torch.equal(x, expected[name]) for name, x in engine.llm.weights.items())
    engine.names = set()  # a family whose embedding is its head
    engine.sync(engine.policy)
    generate(engine)
    assert engine.llm.weights.keys() == expected.keys() - {"lm_head.weight"}


def test_nothing_is_kept_on_cuda_between_calls(engine, monkeypatch):
    engine.sleeps = True
    engine.llm.calls.clear()
    for _ in range(2):
        generate(engine)
    with monkeypatch.context() as patched:
        patched.setattr(LLM, "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(engine)
    one = ["wake up", "reset", "generate", "sleep 2"]
    assert engine.llm.calls == [*one, *["wake up", "reload", *one[1:]], "wake up", "reload", "reset", "sleep 2"]


def test_adapters_are_merged_and_left_alone():
    model = load_policy("scratch:demo", load_tokenizer("arithmetic"))
    names = set(model.state_dict())
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name="own")
    for name, x in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(x)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    merged = {name: x.clone() for name, x in merged_weights(model)}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == names == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in merged.items())
    assert sum(not torch.equal(x, before.get(f"base_model.model.{name}", x[:0])) for name, x in merged.items()) == 6


def test_what_cannot_be_sampled_is_refused(engine):
    with pytest.raises(ValueError, match="prompts must be non-empty lists of token ids"):
        engine.generate([[]], max_new_tokens=1, temperature=1.0, seed=0)
    with pytest.raises(ValueError, match="a prompt with its answer must have at most 20 tokens, got 21"):
        generate(engine, max_new_tokens=19)
    with pytest.raises(ValueError, match=r"at temperature 0 or 0\.01 and above, got 0\.001"):
        generate(engine, temperature=0.001)


def test_where_there_is_no_engine(engine, monkeypatch):
    def build():
        VLLMEngine(engine.policy, [1], max_len=20)

    monkeypatch.setattr(LLM, "collective_rpc", lambda *_, **__: {}["conv.weight"])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be run by vLLM \(KeyError: 'conv.weight'\)"):
        build()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r'"vllm" needs the package vllm, pip install .qrm_fast\[vllm\]., got'):
        build()
