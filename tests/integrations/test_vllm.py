"""vLLM in an environment of its own (`make test-vllm`): its answers against the policy's packed forward, and a run."""

import gc
import math
from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed here: make test-vllm", allow_module_level=True)

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qrm_fast import pack
from qrm_fast.rl.config import Config, preset
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rollout import TransformersEngine, check_sampling
from qrm_fast.rl.train import train
from qrm_fast.rl.vllm_engine import VLLMEngine

pytestmark = pytest.mark.unpoisoned  # vLLM reads what it has not written: rows of padding
NUM_IDS, STOPS, LONGEST = 290, [1, 7], 128


# Before the engine below: where one of two in a process is freed, vLLM takes the other's process group along.
def test_a_run(checkpoints, tmp_path):
    """The sampler follows the policy: it is as close to it after two steps as before the first."""
    config = Config(
        **preset("qrm-released"),
        model=str(checkpoints / "policy"),
        q_rm=str(checkpoints / "q_rm"),
        data=str(checkpoints / "prompts.jsonl"),
        eval_data=str(checkpoints / "prompts.jsonl"),
        out=str(tmp_path / "run"),
        verifier="arithmetic",
        engine="vllm",
        engine_cache_gib=0.25,
        importance="truncate-token",
        num_iterations=3,
        num_prompts=4,
        group_size=4,
        max_new_tokens=24,
        eval_every=3,
        save_every=3,
        lr=1e-2,
    )
    before, *rows = train(config).metrics
    gc.collect()
    assert [row["step"] for row in rows] == [1, 2, 3] and 0 <= before["eval/pass@1_sampled"] <= 1
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert all(row["rollout/logratio_max_abs"] < 1e-4 for row in rows)
    assert all(row["rollout/importance_mean"] == pytest.approx(1, abs=1e-5) for row in rows)
    assert rows[2]["policy/entropy"] < 0.9 * rows[0]["policy/entropy"]  # another policy by then


@pytest.fixture
def policy():
    """Of a vocabulary that is padded past the tokens, and would rather say what is not one of them."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="qrm_packed").eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[NUM_IDS:] *= 10
    return Policy(model, num_ids=NUM_IDS)


@pytest.fixture(scope="module")
def shared():
    """One engine, which takes a second to sync and many to start."""
    return {}


@pytest.fixture
def engine(policy, shared):
    if not shared:
        shared["engine"] = VLLMEngine(policy, STOPS, max_len=LONGEST, cache_gib=0.25)
    shared["engine"].sync(policy)
    return shared["engine"]


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, NUM_IDS, (n,), generator=generator).tolist() for n in (3, 40, 1, 64, 17)]


def generate(engine, **options):
    return engine.generate(prompts(), **dict(num_samples=4, max_new_tokens=48, temperature=1.0, seed=5) | options)


@torch.no_grad()
def distance(policy, rollout, num_samples=4, temperature=1.0):
    """[T]: of the log-probabilities of sampling to those of the packed forward."""
    asked = [prompt for prompt in prompts() for _ in range(num_samples)]
    rows = [prompt + response for prompt, response in zip(asked, rollout.responses, strict=True)]
    trained = policy(pack(rows, list(map(len, asked))), temperature=temperature).logprobs
    return (torch.cat(rollout.logprobs) - trained).abs()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_training(policy, engine, temperature):
    check_sampling(engine, policy, LONGEST)
    rollout = generate(engine, temperature=temperature)
    assert torch.cat(rollout.logprobs).dtype == torch.float32
    assert distance(policy, rollout, temperature=temperature).max() < 1e-4
    assert max(map(max, rollout.responses)) < NUM_IDS


def test_answers_end_at_a_stop_id_or_at_the_limit(engine):
    rollout = generate(engine, num_samples=16, temperature=1.5)
    assert {response[-1] for response, ended in zip(rollout.responses, rollout.finished, strict=True) if ended} == {
        1,
        7,
    }
    for response, finished in zip(rollout.responses, rollout.finished, strict=True):
        assert not {1, 7} & set(response[:-1])
        assert finished == (response[-1] in STOPS) and (finished or len(response) == 48)


def test_tokens_are_distributed_as_the_model_says(policy, engine):
    """First tokens of 4,000 samples of one prompt: no cell further than five standard errors from its probability."""
    num, prompt = 4000, [5, 6, 7]
    rollout = engine.generate([prompt], num_samples=num, max_new_tokens=1, temperature=1.5, seed=0)
    with torch.no_grad():
        p = policy(pack([[*prompt, i] for i in range(NUM_IDS)], [3] * NUM_IDS), temperature=1.5).logprobs.exp()
    counts = torch.bincount(torch.tensor(rollout.responses)[:, 0], minlength=NUM_IDS)
    assert ((counts / num - p).abs() <= 5 * (p * (1 - p) / num).sqrt() + 1e-3).all()


def test_greedy_is_the_argmax(policy, engine):
    rollout = generate(engine, num_samples=1, temperature=0)
    assert (torch.cat(rollout.logprobs) == 0).all()
    assert rollout.responses == generate(TransformersEngine(policy, STOPS), num_samples=1, temperature=0).responses


def test_same_seed_same_bits(engine):
    first, other, again = (generate(engine, seed=seed) for seed in (0, 1, 0))
    assert first.responses == again.responses != other.responses
    assert torch.equal(torch.cat(first.logprobs), torch.cat(again.logprobs))
    assert len(set(map(tuple, first.responses[:4]))) == 4


def test_a_sync_changes_the_weights_in_place(policy, engine):
    before = generate(engine)
    with torch.no_grad():
        for x in policy.parameters():
            x += 0.02 * torch.randn_like(x)
    assert generate(engine).responses == before.responses
    engine.sync(policy)
    after = generate(engine)
    assert after.responses != before.responses
    assert distance(policy, after).max() < 1e-4 < 0.1 < distance(policy, before).max()


def test_adapters_are_sampled_from(policy, engine):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    before = generate(engine)
    adapted = Policy(peft.get_peft_model(policy.model, config), num_ids=NUM_IDS)
    for name, x in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.2)
    engine.sync(adapted)
    assert distance(adapted, generate(engine)).max() < 1e-4 < 0.1 < distance(adapted, before).max()


def test_logits_that_are_not_finite_stop_the_sampling(policy, engine):
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[3] = torch.nan
    engine.sync(policy)
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="sampling from Qwen2ForCausalLM"):
            generate(engine, temperature=temperature)
