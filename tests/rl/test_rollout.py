"""Sampled tokens and their log-probabilities against a full forward of each sequence."""

import copy
import gc
import weakref

import pytest
import torch
from test_architectures import build
from transformers import GPT2Config, GPT2LMHeadModel

from qrm_fast import linear_logprobs, pack
from qrm_fast.rl.attention import packed_hidden
from qrm_fast.rl.decoding import Step, can_be_fixed
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.policy import Policy, PolicyHead
from qrm_fast.rl.rollout import TransformersEngine
from qrm_fast.rl.row_cache import RowCache
from qrm_fast.rl.tokenizers import load_tokenizer

EOS = 1


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model = load_policy("scratch:demo", load_tokenizer("arithmetic"))
    # An untied and sharper head than a fresh network's, so that a wrong position or mask would show.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.15)
    return model


def prompts(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (num,), generator=generator).tolist()
    return [torch.randint(2, 17, (n,), generator=generator).tolist() for n in lengths]


def generate(model, rows, *, max_rows=512, fixed=None, **options):
    engine = TransformersEngine(Policy(model), [EOS], max_rows=max_rows, fixed=fixed)
    return engine.generate(rows, **dict(num_samples=1, seed=0, max_new_tokens=24, temperature=1.0) | options)


def scores(model, rows, rollout, temperature):
    sequences = [prompt + response for prompt, response in zip(rows, rollout.responses, strict=True)]
    batch = pack(sequences, [len(row) for row in rows], device=model.device)
    hidden = packed_hidden(model, batch)[batch.action_index]
    weight = model.lm_head.weight
    return linear_logprobs(hidden, weight, batch.targets[batch.action_index], temperature=temperature).logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_logprobs_equal_a_recomputation(policy, temperature):
    rows = prompts(37)
    rollout = generate(policy, rows, temperature=temperature)
    assert len({len(r) for r in rollout.responses}) > 3  # rows ended at different steps, some were dropped
    assert list(map(len, rollout.logprobs)) == list(map(len, rollout.responses))
    sampled = torch.cat(rollout.logprobs)
    assert sampled.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(sampled, scores(policy, rows, rollout, temperature), rtol=0, atol=1e-4)


def test_responses_stop_at_eos_or_at_the_limit(policy):
    rollout = generate(policy, prompts(64), max_new_tokens=9)
    assert any(rollout.finished) and not all(rollout.finished)
    for response, finished in zip(rollout.responses, rollout.finished, strict=True):
        assert EOS not in response[:-1]
        assert finished == (response[-1] == EOS)
        assert finished or len(response) == 9


def test_tokens_are_distributed_as_the_model_says(policy):
    """First tokens of 4,000 samples of one prompt: no cell further than five standard errors from its probability."""
    prompt = [5, 6, 7]
    num = 4000
    rollout = generate(policy, [prompt] * num, max_new_tokens=1, temperature=1.5)
    with torch.no_grad():
        hidden = packed_hidden(policy, pack([prompt], [1]))[-1]
        p = (policy.lm_head.weight @ hidden / 1.5).softmax(-1)
    counts = torch.bincount(torch.tensor(rollout.responses)[:, 0], minlength=17)
    assert ((counts / num - p).abs() <= 5 * (p * (1 - p) / num).sqrt() + 1e-3).all()


def test_greedy_is_the_argmax_and_does_not_depend_on_the_batch(policy):
    rows = prompts(20)
    together = generate(policy, rows, temperature=0, seed=1)
    assert (torch.cat(together.logprobs) == 0).all()
    assert together.responses == generate(policy, rows, temperature=0, seed=2).responses
    for i in range(0, 20, 7):
        assert generate(policy, [rows[i]], temperature=0).responses == [together.responses[i]]
    row, response = rows[3], together.responses[3]
    with torch.no_grad():
        hidden = packed_hidden(policy, pack([row + response], [len(row)]))
        best = (hidden @ policy.lm_head.weight.T).argmax(-1)
    assert best[len(row) - 1 : -1].tolist() == response


def test_a_response_ends_at_any_of_the_stop_ids(policy):
    engine = TransformersEngine(Policy(policy), [EOS, 5])
    rollout = engine.generate(prompts(64), num_samples=1, max_new_tokens=12, temperature=1.0, seed=0)
    assert {response[-1] for response, done in zip(rollout.responses, rollout.finished, strict=True) if done} == {
        EOS,
        5,
    }
    assert all(not {EOS, 5} & set(response[:-1]) for response in rollout.responses)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_ratio_of_a_bfloat16_policy_to_itself_is_1(softcap, biased, scale):
    """Of logits rounded to 16 bits, as large as these, it would be anywhere in .9 to 1.1."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden, bias = (torch.randn(*n, generator=generator).bfloat16() for n in ((17, 128), (64, 128), (17,)))
    head = PolicyHead(weight, bias if biased else None, softcap, scale)
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    tokens, logprobs = head.sample(hidden, uniforms, temperature=0.7)
    assert head.logits(hidden).abs().max() > 6 and len(tokens.unique()) > 3
    assert torch.equal(logprobs, head.logprobs(hidden, tokens, temperature=0.7).logprobs)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_stop_the_sampling(policy, temperature):
    with torch.no_grad():
        broken = load_policy("scratch:demo", load_tokenizer("arithmetic"))
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"sampling from LlamaForCausalLM gave .* that are not finite"):
        generate(broken, prompts(4), temperature=temperature)


def test_same_seed_same_bits_and_chunks_keep_the_order(policy):
    rows = prompts(16)
    first, again, other = (generate(policy, rows, seed=s) for s in (0, 0, 1))
    assert first.responses == again.responses and torch.equal(torch.cat(first.logprobs), torch.cat(again.logprobs))
    assert first.responses != other.responses
    assert (
        generate(policy, rows, temperature=0, max_rows=5).responses == generate(policy, rows, temperature=0).responses
    )


@pytest.mark.parametrize("max_rows", [512, 8, 2])
def test_the_samples_of_a_prompt_are_neighbours_and_read_it_once(policy, max_rows, monkeypatch):
    rows, read, steps = prompts(9), [], []
    reading, forward = TransformersEngine._read, Step._hidden
    with monkeypatch.context() as patched:
        patched.setattr(TransformersEngine, "_read", lambda self, new: read.extend(new) or reading(self, new))
        patched.setattr(Step, "_hidden", lambda self, ids, *rest: steps.append(ids.shape) or forward(self, ids, *rest))
        rollout = generate(policy, rows, num_samples=3, max_rows=max_rows)
    assert read == rows  # in their order
    assert all(num_new == 1 and num_rows <= max_rows for num_rows, num_new in steps)
    repeated = [row for row in rows for _ in range(3)]
    assert len(rollout.responses) == len(repeated)
    with torch.no_grad():
        expected = scores(policy, repeated, rollout, 1.0)
    torch.testing.assert_close(torch.cat(rollout.logprobs), expected, rtol=0, atol=1e-4)
    greedy = generate(policy, rows, num_samples=3, max_rows=max_rows, temperature=0)
    assert greedy.responses == generate(policy, repeated, temperature=0).responses


@pytest.mark.parametrize(("spare", "max_rows"), [(1, 6), (5, 6), (3, 24)])
def test_rows_that_end_are_taken_by_the_next_answers(policy, spare, max_rows, monkeypatch):
    """Answers are those of their prompts wherever they enter, also where the cache is moved at every step."""
    monkeypatch.setattr("qrm_fast.rl.rollout.SPARE_COLUMNS", spare)
    rows = prompts(40)
    steps, forward = [], Step._hidden
    with monkeypatch.context() as patched:
        patched.setattr(Step, "_hidden", lambda self, ids, *rest: steps.append(len(ids)) or forward(self, ids, *rest))
        rollout = generate(policy, rows, num_samples=2, max_rows=max_rows)
    lengths = list(map(len, rollout.responses))
    assert 24 in lengths and min(lengths) < 6
    # Between an answer and the next a row waits for one step; none waits for the longest answer of its neighbours.
    full = [n for n in steps if n == max_rows]
    busy = max_rows - max_rows // 8  # at least, when no answer is left to begin
    assert len(full) <= (sum(lengths) + len(lengths)) / busy and len(steps) <= len(full) + 24
    repeated = [row for row in rows for _ in range(2)]
    with torch.no_grad():
        expected = scores(policy, repeated, rollout, 1.0)
    torch.testing.assert_close(torch.cat(rollout.logprobs), expected, rtol=0, atol=1e-4)
    again = generate(policy, rows, num_samples=2, max_rows=max_rows)
    assert again.responses == rollout.responses
    assert torch.equal(torch.cat(again.logprobs), torch.cat(rollout.logprobs))
    greedy = generate(policy, rows, max_rows=max_rows, temperature=0)
    assert greedy.responses == generate(policy, rows, temperature=0).responses


@pytest.mark.parametrize(("spare", "max_rows"), [(1, 6), (40, 6), (3, 80)])
def test_steps_of_fixed_shape_are_the_same(policy, spare, max_rows, monkeypatch, device):
    """Also where the cache is moved at almost every step, and on CUDA as a graph."""
    monkeypatch.setattr("qrm_fast.rl.rollout.SPARE_COLUMNS", spare)
    rows, model = prompts(40), copy.deepcopy(policy).to(device)
    greedy = [generate(model, rows, max_rows=max_rows, fixed=x, temperature=0).responses for x in (False, True)]
    assert greedy[0] == greedy[1]
    rollout = generate(model, rows, num_samples=2, max_rows=max_rows, fixed=True)
    assert 24 in map(len, rollout.responses)
    with torch.no_grad():
        expected = scores(model, [row for row in rows for _ in range(2)], rollout, 1.0)
    torch.testing.assert_close(torch.cat(rollout.logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fixed", [False, True])
def test_keys_and_values_go_with_the_answers(policy, fixed, monkeypatch):
    """Also before Python looks for cycles: an update follows, which needs the memory."""
    made, init = [], RowCache.__init__
    monkeypatch.setattr(
        RowCache, "__init__", lambda self, *x, **y: made.append(weakref.ref(self)) or init(self, *x, **y)
    )
    gc.disable()
    try:
        generate(policy, prompts(4), fixed=fixed)
        assert [cache() for cache in made] == [None]
    finally:
        gc.enable()


def test_a_window_smaller_than_the_cache_needs_its_columns_in_order(policy):
    """The newest column is the last there; with fixed shapes it may be any."""
    model = build("Mistral")  # of a window of 4
    assert can_be_fixed(model, 4) and not can_be_fixed(model, 5) and can_be_fixed(policy, 1000)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_row_without_an_answer_keeps_to_the_positions_that_there_are(fixed):
    """Eight rows of nine go on with answers that began after the ninth row's, which has ended and has no next one."""
    torch.manual_seed(0)
    lengths = torch.tensor([2, 4, *[2] * 7, *[24] * 8, 1])  # the last: of a row without an answer

    class Engine(TransformersEngine):
        def _stops(self, token, answer, age):
            return age + 1 >= lengths[answer]

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=18, n_positions=3 + 24)).eval()
    model.set_attn_implementation("qrm_packed")
    engine = Engine(Policy(model), [EOS], max_rows=9, fixed=fixed)
    options = dict(num_samples=1, max_new_tokens=24, temperature=1.0, seed=0)
    assert list(map(len, engine.generate([[5, 6, 7]] * 17, **options).responses)) == lengths[:-1].tolist()


def test_generation_leaves_the_training_mode_alone(policy):
    policy.train()
    generate(policy, prompts(2), max_new_tokens=2)
    assert policy.training
    with pytest.raises(IndexError):
        generate(policy, [[10**6]])
    assert policy.training


def test_bad_arguments(policy):
    for rows in ([], [[3], []]):
        with pytest.raises(ValueError, match="prompts must be non-empty lists of token ids"):
            generate(policy, rows)
    with pytest.raises(ValueError, match=r"temperature must be >= 0, .* and num_samples >= 1, got -1, 24 and 1"):
        generate(policy, [[3]], temperature=-1)
    with pytest.raises(ValueError, match=r"got 1\.0, 0 and 1"):
        generate(policy, [[3]], max_new_tokens=0)
    with pytest.raises(ValueError, match=r"got 1\.0, 24 and 0"):
        generate(policy, [[3]], num_samples=0)
