"""Answers that share their prompt against the same answers with a prompt each: losses, gradients, scores, plans."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import build
from transformers import AttentionInterface

from qrm_fast import pack
from qrm_fast.rl.attention import check_packing, packed_attention, shares_prompts
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.config import Config, preset, token_budget
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.prm import ends_a_step, find_steps
from qrm_fast.rl.scorer import StepScorer, TokenScorer, VocabularyScorer
from qrm_fast.rl.tokenizers import load_tokenizer
from qrm_fast.rl.train import plan, train

TOKENIZER = load_tokenizer("arithmetic")


def batches():
    """The same answers apart and sharing, some of equal length, also to different prompts, one empty, and one prompt
    with nothing to share."""
    generator = torch.Generator().manual_seed(0)
    sequences, prompt_lens = [], []
    for prompt_len, lengths in ((9, [4]), (9, [4, 0, 6, 6]), (1, [3, 3]), (5, [2, 8, 8])):
        prompt = torch.randint(2, 17, (prompt_len,), generator=generator).tolist()
        for n in lengths:
            sequences.append(prompt + torch.randint(2, 17, (n,), generator=generator).tolist())
            prompt_lens.append(prompt_len)
    return pack(sequences, prompt_lens), pack(sequences, prompt_lens, share_prompts=True)


def with_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(model, loss):
    """`loss` of either batch, and its gradients, to 1e-6 of their norm."""
    (expected, gradients), (got, theirs) = (with_gradients(model, loss(batch)) for batch in batches())
    assert (got - expected).abs() <= 1e-6 * expected.abs()
    assert gradients.norm() > 0 and (theirs - gradients).norm() <= 1e-6 * gradients.norm()


def kinds():
    def policy():
        return (
            Policy(load_policy("scratch:demo", TOKENIZER)),
            lambda model, batch: (
                model.loss(batch, torch.linspace(-1, 1, len(batch.seq_ids)), entropy_coef=0.1, temperature=0.7).loss
            ),
        )

    def sequence_ratios():
        return (
            Policy(load_policy("scratch:demo", TOKENIZER)),
            lambda model, batch: (
                model.loss(
                    batch,
                    torch.linspace(-1, 1, len(batch.seq_ids)),
                    kind="gspo",
                    old_logprobs=torch.linspace(-3, -2, len(batch.seq_ids)),
                    clip_low=0.9,
                    clip_high=9.0,
                ).loss
            ),
        )

    def of_tokens(reads_action):
        model = load_token_model("scratch:demo", TOKENIZER)
        return TokenScorer(model, reads_action=reads_action), lambda model, batch: model(batch).square().mean()

    def of_steps():
        closes = ends_a_step(TOKENIZER)
        closes[4:9] = True  # random answers have few blank lines

        def rewards(model, batch):
            packed, ends = find_steps(batch, closes, 7)
            assert len(ends) > 8  # more than the last token of every answer
            return model(packed, ends).square().sum()

        return StepScorer(load_token_model("scratch:demo", TOKENIZER, num_labels=2)), rewards

    def of_vocabulary():
        return VocabularyScorer(
            load_policy("scratch:demo", TOKENIZER)
        ), lambda model, batch: model(batch).square().mean()

    return {
        "policy": policy,
        "policy, gspo": sequence_ratios,
        "Q-RM": lambda: of_tokens(True),
        "critic": lambda: of_tokens(False),
        "PRM": of_steps,
        "Q-RM with a vocabulary": of_vocabulary,
    }


@pytest.mark.parametrize("kind", kinds())
def test_losses_and_gradients_are_those_of_answers_with_a_prompt_each(kind):
    torch.manual_seed(0)
    model, loss = kinds()[kind]()
    assert_same(model, lambda batch: loss(model, batch))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Mistral", "Gemma 2", "gpt-oss", "DeepSeek-V3", "GPT-2"])
def test_windows_caps_and_sinks_share_too(family, tmp_path):
    save_checkpoint(build(family), TOKENIZER, tmp_path)
    policy = Policy(load_policy(str(tmp_path), TOKENIZER))
    assert shares_prompts(policy.model, 24)
    advantages = torch.linspace(-1, 1, len(batches()[0].seq_ids))
    assert_same(policy, lambda batch: policy.loss(batch, advantages).loss)


def own_keys_alone(*inputs, cu_seq_lens_q=None, cu_seq_lens_k=None, **options):
    """Attention that would do for whole sequences, and does not know of shared rows."""
    return packed_attention(*inputs, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_q, **options)


@pytest.fixture
def unaware():
    AttentionInterface.register("qrm_packed", own_keys_alone)
    yield
    AttentionInterface.register("qrm_packed", packed_attention)


def test_a_model_that_cannot_share_is_found_out_and_named(unaware):
    model = load_policy("scratch:demo", TOKENIZER).train()
    check_packing(model, 24)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM reads the prompt of every answer anew: .* differ by"):
        assert not shares_prompts(model, 24)
    assert model.training


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 64])
def test_the_check_takes_any_length(num_tokens, recwarn):
    assert shares_prompts(load_policy("scratch:demo", TOKENIZER), num_tokens)
    assert not recwarn.list


@pytest.fixture
def config(checkpoints, tmp_path):
    return Config(
        model=str(checkpoints / "policy"),
        q_rm=str(checkpoints / "q_rm"),
        data=str(checkpoints / "prompts.jsonl"),
        out=str(tmp_path / "run"),
        overwrite=True,
        num_iterations=2,
        num_prompts=4,
        group_size=4,
        max_new_tokens=8,
        lr=1e-3,
        **preset("qrm-released", "ppo"),
    )


def test_the_loop_learns_the_same_and_says_how_much_was_shared(config, monkeypatch):
    """Policy, reference, Q-RM and critic; and the unshared way where one of them could not."""
    shared = train(config).metrics
    monkeypatch.setattr("qrm_fast.rl.train.shares_prompts", lambda model, num_tokens: False)
    apart = train(config).metrics
    assert [row["perf/prefix_sharing"] for row in apart] == [0, 0]
    assert all(0.2 < row["perf/prefix_sharing"] < 0.75 for row in shared)
    for a, b in zip(shared, apart, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith(("time/", "perf/")):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_a_budget_that_is_left_open_holds_the_longest_answer():
    config = Config(model="", data="", out="")
    assert token_budget(100, config) == 2048 and token_budget(3000, config) == 3000
    assert token_budget(100, replace(config, device="cuda:1")) == 8192
    assert token_budget(100, replace(config, max_tokens=70)) == 70


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.data(),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([18, 40, 200]),
)
def test_a_plan_keeps_to_the_budget_and_a_prompts_answers_together(prompt_lens, data, num_minibatches, max_tokens):
    config = Config(model="", data="", out="", group_size=3, num_minibatches=num_minibatches, max_tokens=max_tokens)
    lens = [n for n in prompt_lens for _ in range(3)]
    responses = data.draw(st.lists(st.integers(1, 9), min_size=len(lens), max_size=len(lens)))
    kept = sorted(data.draw(st.sets(st.sampled_from(range(len(lens))), min_size=1)))
    lengths = [p + r for p, r in zip(lens, responses, strict=True)]
    num_parts = min(num_minibatches, len(kept))
    planned = plan(kept, lengths, lens, num_parts, config, seed=1)
    assert sorted(s for minibatch in planned for answers in minibatch for s in answers) == kept
    sizes = [sum(map(len, minibatch)) for minibatch in planned]
    assert len(sizes) == min(num_minibatches, len(kept)) and max(sizes) - min(sizes) <= 1
    for minibatch in planned:
        for answers in minibatch:
            sequences = [[s // 3] * lens[s] + [99] * responses[s] for s in answers]
            batch = pack(sequences, [lens[s] for s in answers], share_prompts=True)
            assert len(batch.input_ids) <= max_tokens
    whole = [sum(lengths[3 * g : 3 * g + 3]) for g in range(len(prompt_lens))]
    if num_minibatches == 1 and max(whole) <= max_tokens:  # no prompt is read in two micro-batches
        seen = [g for answers in planned[0] for g in {s // 3 for s in answers if lens[s] > 1}]
        assert len(seen) == len(set(seen))
    apart = replace(config, max_tokens=max_tokens)
    for minibatch in plan(kept, lengths, None, num_parts, apart, seed=1):
        for answers in minibatch:
            assert sum(lengths[s] for s in answers) <= max_tokens
            assert [lengths[s] for s in answers] == sorted(lengths[s] for s in answers)
