"""Best of k: the share over all subsets against counting them, aggregations by hand, who chooses, bad input."""

import math
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from qrm_fast import pack
from qrm_fast.rl.arithmetic import arithmetic_examples
from qrm_fast.rl.best_of import Judge, _chosen_right, aggregate, best_of, check_choice, early_reject, sample_answers
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.config import Config
from qrm_fast.rl.data import STEP, Rows
from qrm_fast.rl.models import load_token_model
from qrm_fast.rl.rollout import Rollout
from qrm_fast.rl.tokenizers import load_tokenizer
from qrm_fast.rl.verifiers import VERIFIERS

TOKENIZER = load_tokenizer("arithmetic")
CONFIG = Config(model="m", data="d", out="o", verifier="short", max_new_tokens=8)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_every_subset_counts_once(k):
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.3, 0.9], [1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5]).double()
    right = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).double()
    shares = []
    for of_scores, of_right in zip(scores.tolist(), right.tolist(), strict=True):
        for subset in combinations(range(5), k):
            best = [i for i in range(5) if of_scores[i] == max(of_scores[j] for j in subset)]
            shares.append(sum(of_right[i] for i in best) / len(best))
    assert _chosen_right(scores, right, k) == pytest.approx(sum(shares) / len(shares))
    any_right = [max(row[i] for i in subset) for row in right.tolist() for subset in combinations(range(5), k)]
    assert _chosen_right(right, right, k) == pytest.approx(sum(any_right) / len(any_right))


def test_aggregations():
    r = torch.tensor([0.6, -0.2]).double()
    w = 1 / (1 + math.exp(8))
    expected = {"mean": 0.2, "min": -0.2, "last": -0.2, "product": 0.8 * 0.4, "soft-min": 0.6 * w - 0.2 * (1 - w)}
    for name, value in expected.items():
        assert aggregate(r, name).item() == pytest.approx(value)


class Engine:
    """Four answers to each prompt, of which some are short."""

    responses = ([4, 16, 5, 1], [4, 1], [4, 16, 16, 5, 6, 1], [4, 16, 5, 6, 1])

    def generate(self, prompts, *, num_samples, **_):
        rows = [self.responses[i] for _ in prompts for i in range(num_samples)]
        return Rollout(rows, [torch.zeros(len(row)) for row in rows], [True] * len(rows))


def problems(num=3):
    return Rows(arithmetic_examples(num, split="train", seed=0), [f"p.jsonl:{i}" for i in range(1, num + 1)])


def sampled(num, judge):
    return sample_answers(Engine(), TOKENIZER, problems(), CONFIG, num, judge)


def by_length(sign, prompts, responses):
    return torch.tensor([sign * len(response) for response in responses]).double()


def test_the_answer_of_the_highest_score_is_chosen(monkeypatch):
    monkeypatch.setitem(VERIFIERS, "short", lambda response, label: len(response) < 2)
    for sign, at_two, at_four in ((1, 0.0, 0.0), (-1, 0.5, 1.0)):
        judge = partial(by_length, sign)
        results = best_of(sampled(4, judge))
        assert [x.num_answers for x in results] == [1, 2, 4]
        assert [x.accuracy for x in results] == [0.25, at_two, at_four]
        assert [x.some_right for x in results] == [0.25, 0.5, 1.0]
        assert [x.num_tokens for x in results] == [4.25, 8.5, 17.0]
    by_verifier = best_of(sampled(3, None))
    assert [(x.num_answers, x.accuracy) for x in by_verifier] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    with pytest.raises(ValueError, match=r"scores must be finite, got nan for an answer to p.jsonl:2"):
        sampled(4, lambda _, rows: torch.tensor([0.0] * 4 + [math.nan] * 8))


def test_the_half_that_scores_lowest_by_then_is_dropped(monkeypatch):
    """Answers of 4, 2, 6 and 5 tokens. After 3 of them: 3, 2, 3 and 3, of which the longest, then the earliest stay."""
    monkeypatch.setitem(VERIFIERS, "short", lambda response, label: len(response) < 6)
    judge = partial(by_length, 1)
    accuracy, num_tokens, saved = early_reject(sampled(4, judge), judge, 3)
    assert (num_tokens, saved) == (4 + 2 + 6 + 3, pytest.approx(2 / 17))
    assert accuracy == 0.0  # of 4 and 6 tokens the latter is chosen, which is not right
    shortest = partial(by_length, -1)
    assert early_reject(sampled(3, shortest), shortest, 3)[:2] == (1.0, 4 + 2 + 3)
    assert early_reject(sampled(4, judge), judge, 100).saved == 0.0
    with pytest.raises(ValueError, match=r"scores must be finite, got nan for an answer to p.jsonl:3"):
        early_reject(sampled(4, judge), lambda _, rows: torch.tensor([0.0] * 8 + [math.nan] * 4), 3)


@pytest.mark.parametrize("rerank", ["qrm", "orm", "prm"])
def test_scores_are_those_of_the_models_head(tmp_path, rerank, monkeypatch):
    """Against transformers' own forward, one answer at a time, whatever the micro-batches and who shares a prompt."""
    torch.manual_seed(0)
    model = load_token_model("scratch:demo", TOKENIZER, num_labels=2 if rerank == "prm" else 1)
    model.config.step_separator = STEP
    save_checkpoint(model, TOKENIZER, tmp_path / "rm")
    config = SimpleNamespace(device="cpu", dtype="float32", max_tokens=14)
    aggregation = check_choice(rerank, "rm", None)
    assert aggregation == {"qrm": "mean", "orm": "last", "prm": "soft-min"}[rerank]
    judge = Judge(rerank, str(tmp_path / "rm"), TOKENIZER, aggregation=aggregation, longest=12, config=config)
    prompts, responses = [[2, 3], [5, 6, 7], [5, 6, 7], [8]], Engine.responses
    sizes = []

    def counted(*args, **kwargs):
        batch = pack(*args, **kwargs)
        sizes.append(len(batch.input_ids))
        return batch

    monkeypatch.setattr("qrm_fast.rl.best_of.pack", counted)
    got = judge(prompts, responses)
    assert len(sizes) > 1 and sum(sizes) == sum(map(len, [*prompts, *responses])) - 2
    model.set_attn_implementation("sdpa")
    for prompt, response, score in zip(prompts, responses, got, strict=True):
        seen = [*response[:-1], 16] if rerank == "prm" else response
        with torch.no_grad():
            z = model(torch.tensor([prompt + seen]), use_cache=False).logits[0, len(prompt) :].double()
        if rerank == "prm":
            z = z.softmax(-1)[[t for t, token in enumerate(seen) if token == 16]]
            z = z[:, 1:] - z[:, :1]
        assert score.item() == pytest.approx(aggregate(z[:, 0], aggregation).item(), abs=1e-5)
    with pytest.raises(ValueError, match="max_tokens must hold the longest prompt and max_new_tokens, 15 tokens, got"):
        Judge(rerank, str(tmp_path / "rm"), TOKENIZER, aggregation=aggregation, longest=15, config=config)
    if rerank != "prm":
        model.config.reward_model = other = {"qrm": "orm", "orm": "qrm"}[rerank]
        save_checkpoint(model, TOKENIZER, tmp_path / "other")
        with pytest.raises(ValueError, match=f"got a model that was trained with --kind {other}"):
            Judge(rerank, str(tmp_path / "other"), TOKENIZER, aggregation=aggregation, longest=12, config=config)
        with pytest.raises(ValueError, match=f"aggregation product multiplies probabilities, which {rerank} does not"):
            Judge(rerank, str(tmp_path / "rm"), TOKENIZER, aggregation="product", longest=12, config=config)


@pytest.mark.parametrize(("rerank", "num_labels"), [("qrm", 1), ("orm", 1), ("prm", 2)])
def test_a_reward_model_of_another_vocabulary_or_kind_is_refused(tmp_path, rerank, num_labels):
    other = load_tokenizer("bpe", ["1+1"])
    how = dict(aggregation="min", longest=12, config=CONFIG)
    save_checkpoint(load_token_model("scratch:demo", other, num_labels=num_labels), other, tmp_path / "other")
    with pytest.raises(ValueError, match="policy and reward model must share one vocabulary, got 18 and"):
        Judge(rerank, str(tmp_path / "other"), TOKENIZER, **how)
    kind = load_token_model("scratch:demo", TOKENIZER, num_labels=3 - num_labels)
    save_checkpoint(kind, TOKENIZER, tmp_path / "kind")
    with pytest.raises(
        ValueError, match=f"must be an? .*, a token classifier with {['one label', 'two labels'][num_labels - 1]}"
    ):
        Judge(rerank, str(tmp_path / "kind"), TOKENIZER, **how)


def test_what_does_not_go_together():
    for arguments, sentence in (
        (("judge", "rm", None), "rerank must be one of qrm, prm, orm, verifier, got judge"),
        (("qrm", "rm", "sum"), "aggregation must be one of mean, min, last, product, soft-min, got sum"),
        (("qrm", None, None), "reward_model must be given to rerank by a model only, got None for qrm"),
        (("verifier", "rm", None), "reward_model must be given to rerank by a model only, got rm for verifier"),
        (("verifier", None, "min"), "aggregation is of a reward model's scores, expected none for verifier, got min"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_choice(*arguments)
