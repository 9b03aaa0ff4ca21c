"""Training a Q-RM: what is read where, gradients that do not depend on the micro-batches, checkpoints, bad input."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from qrm_fast import pack
from qrm_fast.rl.arithmetic import arithmetic_demonstration, arithmetic_examples
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.data import Pair, write_jsonl
from qrm_fast.rl.models import load_policy, load_q_rm, load_token_model, load_vocabulary_q
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.reward_training import ORMConfig, QRMConfig, TokenPair, evaluate_pairs, pair_loss, train_q_rm
from qrm_fast.rl.score import score
from qrm_fast.rl.scorer import TokenScorer, VocabularyScorer
from qrm_fast.rl.tokenizers import load_tokenizer


def write_pairs(path, num_prompts):
    """Right answers against answers with a slip, two pairs for every third prompt."""
    rng = Random(0)
    rows, prompts = [], 0
    for instruction, label in arithmetic_examples(4 * num_prompts, split="train", seed=0):
        answers = dict.fromkeys(arithmetic_demonstration(instruction, rng) for _ in range(40))
        wrong = [answer for answer in answers if not answer.endswith(label)]
        if len(wrong) > 1 and prompts < num_prompts:  # a prompt may offer no occasion to slip
            right = arithmetic_demonstration(instruction)
            rows += [Pair(instruction, right, answer) for answer in wrong[: 1 + (prompts % 3 == 0)]]
            prompts += 1
    write_jsonl(path, rows)
    return rows


@pytest.fixture
def config(tmp_path):
    assert len(write_pairs(tmp_path / "pairs.jsonl", 60)) == 80
    return QRMConfig(
        data=str(tmp_path / "pairs.jsonl"),
        out=str(tmp_path / "q_rm"),
        overwrite=True,
        model="scratch:demo",
        tokenizer="arithmetic",
        batch_size=16,
        lr=1e-3,
    )


def parameters(directory):
    return AutoModelForTokenClassification.from_pretrained(directory).state_dict()


def test_q_is_the_head_on_the_state_that_has_consumed_the_action():
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    q_rm = load_token_model("scratch:demo", tokenizer)
    sequences, prompt_lens = [[4, 5, 6, 7, 1], [3, 8, 1]], [2, 1]
    with torch.no_grad():
        q = TokenScorer(q_rm, reads_action=True)(pack(sequences, prompt_lens))
        q_rm.set_attn_implementation("sdpa")
        q_rm.eval()
        scores = [q_rm(torch.tensor([row]), use_cache=False).logits[0, :, 0] for row in sequences]
    expected = torch.cat([row[n:] for row, n in zip(scores, prompt_lens, strict=True)])
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-5)


def test_pairs_are_learned_and_the_checkpoint_is_plain(config):
    result = train_q_rm(replace(config, num_epochs=12))
    assert result.num_heldout >= 9 and result.num_train + result.num_heldout == 80
    assert result.train.accuracy > 0.65 and result.train.margin > 0
    assert result.train.loss < 2.1269  # softplus(gamma), where every score is equal
    model = AutoModelForTokenClassification.from_pretrained(result.directory)
    assert model.config.num_labels == 1 and model.score.bias is None


def of_pairs(config, kind):
    options = {field: getattr(config, field) for field in ("data", "out", "overwrite", "model", "tokenizer", "lr")}
    kinds = {"orm": ORMConfig, "qrm-vocab": partial(QRMConfig, kind="qrm-vocab")}
    return kinds[kind](**options, batch_size=16, num_epochs=12)


def test_a_q_rm_and_an_orm_are_told_apart_by_their_mark(config):
    tokenizer = load_tokenizer("arithmetic")
    cases = (config, "orm", "an ORM"), (of_pairs(config, "orm"), "qrm", "a Q-RM")
    for trained, asked, name in cases:
        out = train_q_rm(replace(trained, num_epochs=1, heldout=0.0)).directory
        with pytest.raises(ValueError, match=f"must be {name}, got a model .* with --kind {trained.kind}"):
            load_q_rm(out, tokenizer, kind=asked)
        load_q_rm(out, tokenizer, kind=trained.kind)
        assert len(score(out, "1+1:", ["02"])[0].q) == 3  # either kind, as its checkpoint says
    unmarked = load_token_model("scratch:demo", tokenizer)
    save_checkpoint(unmarked, tokenizer, config.out)
    for kind in ("qrm", "orm"):
        load_q_rm(config.out, tokenizer, kind=kind)


@pytest.mark.parametrize("kind", ["orm", "qrm-vocab"])
def test_the_other_kinds_learn_pairs_too(config, kind):
    result = train_q_rm(of_pairs(config, kind))
    assert result.train.accuracy > 0.65 and result.train.margin > 0
    first = json.loads(Path(config.out, "metrics.jsonl").read_text().splitlines()[0])
    assert f"{kind.removesuffix('-vocab')}/loss" in first
    tokenizer = load_tokenizer("arithmetic")
    if kind == "orm":
        assert result.train.loss < math.log(2)
        assert AutoModelForTokenClassification.from_pretrained(result.directory).config.num_labels == 1
    else:
        assert result.train.loss < 2.1269
        assert AutoModelForCausalLM.from_pretrained(result.directory).config.vocab_size == len(tokenizer)
        load_vocabulary_q(result.directory, tokenizer)
        save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, config.out)
        with pytest.raises(ValueError, match="must be a Q-RM with a vocabulary head, got a model that was not"):
            load_vocabulary_q(config.out, tokenizer)


def test_an_orm_is_read_at_the_last_token_and_a_vocabulary_head_before_the_action():
    """Golden values of the released code: two pairs, last-token .2519137, mean-score 2.0205970."""
    batch = pack([[0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]], [1, 1, 1, 1])
    q = torch.tensor([1, 2, -1, 4, -1, 0.5, 0.5, 0.5, 2, 1, 0])
    last, mean = (pair_loss(q, batch, kind(data="d", out="o")).loss.item() for kind in (ORMConfig, QRMConfig))
    assert (last, mean) == (pytest.approx(0.2519137, abs=1e-6), pytest.approx(2.0205970, abs=1e-6))
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    model = load_policy("scratch:demo", tokenizer)
    rows, prompt_lens = [[4, 5, 6, 7, 1], [3, 8, 1]], [2, 1]
    with torch.no_grad():
        q = VocabularyScorer(model)(pack(rows, prompt_lens))
        model.set_attn_implementation("sdpa")
        logits = [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]
    expected = [logits[i][t - 1, row[t]] for i, row in enumerate(rows) for t in range(prompt_lens[i], len(row))]
    torch.testing.assert_close(q, torch.stack(expected), rtol=0, atol=1e-5)


def test_what_is_measured_of_pairs():
    """Two pairs that part at their second and first action, by scores that are the token ids; micro-batches of one."""
    pairs = [TokenPair([2], [2, 3, 9, 1], [2, 3, 4, 5, 1]), TokenPair([2, 2], [2, 2, 5, 1], [2, 2, 7, 1])]
    config = QRMConfig(data="d", out="o", beta=1.0, gamma=0.5, max_tokens=9)
    measured = evaluate_pairs(lambda batch: batch.targets[batch.action_index].float(), pairs, config)
    margins = (3 + 9 + 1) / 3 - (3 + 4 + 5 + 1) / 4, (5 + 1) / 2 - (7 + 1) / 2
    loss = sum(math.log1p(math.exp(0.5 - margin)) for margin in margins) / 2
    assert measured == pytest.approx((loss, 0.5, 0.5, sum(margins) / 2))
    swapped = [TokenPair(pair.prompt, pair.rejected, pair.chosen) for pair in pairs[:1]]
    assert evaluate_pairs(lambda batch: batch.targets[batch.action_index].float(), swapped, config)[1:3] == (0.0, 0.0)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_side_is_refused_by_its_line(config, side):
    pair = {"chosen": "02", "rejected": "03", side: " \n"}
    with open(config.data, "a") as lines:
        lines.write(json.dumps({"instruction": "1+1:", **pair}) + "\n")
    with pytest.raises(ValueError, match=rf"pairs.jsonl:81: expected an answer in '{side}', got an empty text"):
        train_q_rm(config)


def test_same_config_same_bits(config):
    train_q_rm(config)
    first = parameters(config.out)
    train_q_rm(replace(config, out=config.out + "2"))
    for name, value in parameters(config.out + "2").items():
        assert torch.equal(value, first[name])


def test_gradient_does_not_depend_on_the_microbatches(config, monkeypatch):
    gradients, step = [], AdamW.step

    def recording_step(optimizer, lr, max_grad_norm):
        gradients.append(torch.cat([p.grad.flatten() for p in optimizer.parameters]))
        return step(optimizer, lr, max_grad_norm)

    monkeypatch.setattr(AdamW, "step", recording_step)
    for max_tokens in (8192, 250):
        train_q_rm(replace(config, batch_size=1000, max_tokens=max_tokens))
    whole, pieces = gradients
    assert (whole - pieces).norm() <= 1e-5 * whole.norm()


def test_answers_are_cut_from_the_right_and_prompts_never(config):
    result = train_q_rm(replace(config, max_len=20))
    assert result.tokens_per_s > 0
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: a prompt must leave room for a response in 8 tokens, got"):
        train_q_rm(replace(config, max_len=8))


def test_bad_input(config, tmp_path):
    with pytest.raises(ValueError, match=r"max_tokens"):
        train_q_rm(replace(config, max_tokens=60))
    with pytest.raises(ValueError, match=r"heldout must leave rows to train on and to evaluate, got 1.0 of 60 prompts"):
        train_q_rm(replace(config, heldout=1.0))
    with open(config.data, "a") as lines:
        lines.write('{"instruction": "1+1:"}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl:81: expected a string field 'chosen', got only"):
        train_q_rm(config)
    with pytest.raises(FileNotFoundError):
        train_q_rm(replace(config, data=str(tmp_path / "missing.jsonl")))
    assert not (tmp_path / "q_rm").exists()


def test_real_pairs_with_a_tokenizer_from_the_file(real_data, tmp_path):
    lines = (real_data / "gsm8k_pairs.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = QRMConfig(
        data=str(tmp_path / "pairs.jsonl"),
        out=str(tmp_path / "q_rm"),
        overwrite=True,
        tokenizer="bpe",
        heldout=0.2,
        batch_size=4,
        lr=1e-3,
    )
    result = train_q_rm(config)
    assert (result.num_train, result.num_heldout) == (8, 2)
    assert len(load_tokenizer(result.directory)) <= 4096


def test_pairs_equal_as_given_or_as_cut_are_left_out(config, tmp_path):
    rows = [
        Pair("1+1:", "02", "03"),
        Pair("1+2:", "03", "03"),
        Pair("1+3:", "04+++", "04+++1"),
        Pair("2+3:", "05", "5"),
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = replace(config, heldout=0.0, max_len=8)
    with pytest.warns(UserWarning, match=r"2 of 4 pairs have two equal sides .* the first is .*pairs.jsonl:2"):
        assert train_q_rm(config).num_train == 2
    write_jsonl(tmp_path / "pairs.jsonl", rows[1:2])
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: expected pairs of different answers, but 1 of 1 pairs"):
        train_q_rm(config)
