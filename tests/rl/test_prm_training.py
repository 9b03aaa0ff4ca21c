"""Training a PRM: what is read where, the two stages, gradients, plain checkpoints, what is refused by its line."""

import json
import math
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification

from qrm_fast import pack
from qrm_fast.rl.arithmetic import arithmetic_demonstration, arithmetic_examples, arithmetic_steps
from qrm_fast.rl.attention import backbone
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.data import STEP, Solution, read_rows, write_jsonl
from qrm_fast.rl.models import load_policy, load_prm, load_token_model
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.prm import ends_a_step, find_steps, separator_id, separator_of
from qrm_fast.rl.prm_training import PRMConfig, TokenSolution, evaluate_steps, train_prm
from qrm_fast.rl.run_folder import Stopped
from qrm_fast.rl.score import score_steps
from qrm_fast.rl.scorer import StepScorer
from qrm_fast.rl.tokenizers import load_tokenizer


def write_solutions(path, num):
    """Solutions with slips, whose steps are judged exactly."""
    rng, rows = Random(0), []
    for prompt, _ in arithmetic_examples(num, split="train", seed=0):
        answer = arithmetic_demonstration(prompt, rng)
        rows.append(Solution(prompt, tuple(answer.split(STEP)), tuple(arithmetic_steps(prompt, answer))))
    write_jsonl(path, rows)
    return rows


@pytest.fixture
def config(tmp_path):
    write_solutions(tmp_path / "solutions.jsonl", 60)
    return PRMConfig(
        data=str(tmp_path / "solutions.jsonl"),
        out=str(tmp_path / "prm"),
        overwrite=True,
        model="scratch:demo",
        tokenizer="arithmetic",
        separator=STEP,
        num_head_epochs=1,
        batch_size=16,
        lr=1e-3,
    )


def parameters(directory):
    return AutoModelForTokenClassification.from_pretrained(directory).state_dict()


def gradients_of(config, monkeypatch):
    recorded, step = [], AdamW.step

    def recording_step(optimizer, lr, max_grad_norm):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in optimizer.parameters]
        recorded.append((lr, torch.cat([grad.flatten() for grad in grads])))
        return step(optimizer, lr, max_grad_norm)

    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "step", recording_step)
        train_prm(config)
    return recorded


def test_steps_are_read_as_both_layouts_of_columns(tmp_path):
    rows = [
        {"prompt": "1+1:", "completions": ["01+1=02", "#02"], "labels": [True, False]},
        {"instruction": "1+1:", "steps": ["01+1=02", "#02"], "labels": [1, 0]},
        {"question": "1+1:", "steps": "01+1=02\n\n#02", "labels": [1.0, False], "answer": "2"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(tmp_path / "rows.jsonl", Solution) == 3 * [Solution("1+1:", ("01+1=02", "#02"), (True, False))]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"labels": [1, 0]}, "expected steps, a text or a list of texts, in 'steps' or 'completions', got only"),
        ({"steps": [], "labels": []}, "expected steps, a text or a list of texts, .* got list"),
        ({"steps": ["a", 1], "labels": [1, 0]}, "expected steps, a text or a list of texts, .* got list"),
        ({"steps": ["a", "b"]}, "expected a list of labels in 'labels', got only"),
        ({"steps": ["a", "b"], "labels": [1]}, "expected one label for each step, got 1 labels and 2 steps"),
        ({"completions": "a, b", "labels": [1, 0]}, "expected one label for each step, got 2 labels and 1 steps"),
        ({"steps": ["a", "b"], "labels": [1, 2]}, "labels must be true or false, 1 or 0, got 2 for step 2"),
        ({"steps": ["a"], "labels": [math.nan]}, "labels must be true or false, 1 or 0, got nan for step 1"),
        ({"steps": ["a"], "labels": ["+"]}, "labels must be true or false, 1 or 0, got '\\+' for step 1"),
        ({"steps": ["a\ud800"], "labels": [1]}, "expected text in 'step 1', got the lone surrogate"),
    ],
)
def test_malformed_solutions_are_named_by_their_line(config, fields, sentence):
    with open(config.data, "a") as lines:
        lines.write(json.dumps({"instruction": "1+1:", **fields}) + "\n")
    with pytest.raises(ValueError, match=rf"solutions.jsonl:61: {sentence}"):
        train_prm(config)
    assert not (torch.os.path.exists(config.out))


def test_bad_options(config):
    with pytest.raises(ValueError, match="separator must be one token of the tokenizer, got '12', 2 tokens"):
        train_prm(replace(config, separator="12"))
    with pytest.raises(ValueError, match="num_head_epochs and num_epochs must not both be 0"):
        train_prm(replace(config, num_head_epochs=0, num_epochs=0))
    with pytest.raises(ValueError, match=r"solutions.jsonl:1: a prompt must leave room for a response in 8 tokens"):
        train_prm(replace(config, max_len=8))
    with pytest.raises(ValueError, match=r"solutions.jsonl:1: expected solutions with a step, but 60 of 60 solutions"):
        train_prm(replace(config, max_len=13))
    with pytest.raises(
        ValueError, match=r"heldout must leave rows to train on and to evaluate, got 1\.0 of 60 prompts"
    ):
        train_prm(replace(config, heldout=1.0))
    assert not torch.os.path.exists(config.out)


def test_a_prm_is_read_at_the_separators_and_sees_nothing_else_of_a_blank_line():
    """Two answers, one that ends by itself and one that was cut, against transformers' own forward."""
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    model = load_token_model("scratch:demo", tokenizer, num_labels=2)
    blank, newline, eos = 16, 5, 1
    ends = ends_a_step(tokenizer)
    assert ends.nonzero()[:, 0].tolist() == [blank] == [separator_id(tokenizer, STEP)]
    rows, prompt_lens = [[2, 3, 4, blank, 6, blank, eos], [7, 8, 9, 10]], [2, 1]
    batch, step_ends = find_steps(pack(rows, prompt_lens), ends, newline)
    assert step_ends.tolist() == [1, 3, 4, 7]
    with torch.no_grad():
        logits = StepScorer(model)(batch, step_ends)
        model.set_attn_implementation("sdpa")
        seen = [[2, 3, 4, newline, 6, newline, newline], [7, 8, 9, newline]]
        theirs = [model(torch.tensor([row]), use_cache=False).logits[0] for row in seen]
    expected = torch.cat([theirs[0][[3, 5, 6]], theirs[1][[3]]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_tokens_that_end_a_step_carry_other_characters():
    tokenizer = load_tokenizer("bpe", 50 * ["a.\n\nb:\n\nc\n\n"])
    tokenizer.add_tokens([".\n\n", "\n\n."])
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert {text for text, end in zip(texts, ends_a_step(tokenizer), strict=True) if end} == {"\n\n", ".\n\n"}
    with pytest.raises(ValueError, match="the tokenizer must have a token that ends with a blank line"):
        ends_a_step(load_tokenizer("bpe", ["ab"]))


def test_the_head_learns_first_and_alone(config, monkeypatch):
    recorded = gradients_of(replace(config, heldout=0.0, num_head_epochs=2, head_lr=0.01, lr=0.002), monkeypatch)
    head = 2 * 128 + 2
    num_trunk = [int(grad[:-head].count_nonzero()) for _, grad in recorded]
    assert [lr for lr, _ in recorded] == 8 * [0.01] + 4 * [0.002]
    assert num_trunk[:8] == 8 * [0] and all(num_trunk[8:])
    assert all(grad[-head:].count_nonzero() for _, grad in recorded)


def test_gradient_is_that_of_the_mean_over_steps_and_does_not_depend_on_the_microbatches(config, monkeypatch):
    config = replace(config, batch_size=1000, num_head_epochs=0, heldout=0.0)
    [(_, whole)], [(_, pieces)] = (
        gradients_of(replace(config, max_tokens=max_tokens), monkeypatch) for max_tokens in (8192, 250)
    )
    assert (whole - pieces).norm() <= 1e-5 * whole.norm()

    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(config.seed)
    model = load_token_model("scratch:demo", tokenizer, num_labels=2)
    model.set_attn_implementation("sdpa")
    losses = []
    for prompt, steps, labels in read_rows(config.data, Solution):
        ids = tokenizer(prompt).input_ids
        for step, label in zip(steps, labels, strict=True):
            ids = ids + tokenizer(step + STEP).input_ids
            losses.append((len(ids) - 1, int(label)))
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        mine = [i for i, x in enumerate(losses) if isinstance(x, tuple)]
        for i in mine:
            row, label = losses[i]
            losses[i] = F.cross_entropy(logits[row], torch.tensor(label))
    torch.stack(losses).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (whole - expected).norm() <= 1e-4 * expected.norm()


def test_same_config_same_bits_and_resuming_loses_none(config, monkeypatch):
    train_prm(replace(config, num_epochs=2))
    whole = parameters(config.out)
    resumed = replace(config, num_epochs=2, out=config.out + "2", save_every=5)
    step = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda *args: (_stop_after(6, resumed), step(*args))[1])
    with pytest.raises(Stopped):
        train_prm(resumed)
    monkeypatch.undo()
    train_prm(replace(resumed, overwrite=False, resume=True))
    for name, value in parameters(resumed.out).items():
        assert torch.equal(value, whole[name])


def _stop_after(num_steps, config, counts={}):  # noqa: B006
    counts[config.out] = counts.get(config.out, 0) + 1
    if counts[config.out] == num_steps:
        torch.os.kill(torch.os.getpid(), 15)


def test_steps_are_learned_and_the_checkpoint_is_plain_and_scores(config):
    """The embedded task's exact labels: a PRM miniature that finds wrong steps of prompts it has not seen."""
    write_solutions(config.data, 1500)
    config = replace(config, num_head_epochs=0, num_epochs=6, batch_size=32, lr=2e-3, warmup_steps=8, decay=0.5)
    result = train_prm(config)
    assert (result.num_train, result.num_heldout) == (1275, 225)
    assert result.heldout.accuracy > 0.9 and result.heldout.wrong_found > 0.5 and result.heldout.first_error > 0.6
    assert sum(num for _, _, num in result.bins) > 225 and result.heldout.calibration_error < 0.1

    model = AutoModelForTokenClassification.from_pretrained(result.directory).eval()
    assert model.config.num_labels == 2 and model.score.bias.shape == (2,) and separator_of(model.config) == STEP
    preferred = 0
    for b in range(9):  # a sum that loses its carry, beside the right one; a PRM so small may be wrong about some
        right, wrong = f"0{9 - b}+9={18 - b}\n\n{18 - b}+1={19 - b}\n\n#{19 - b}", f"0{9 - b}+9=0{8 - b}"
        scores = score_steps(result.directory, f"{9 - b}+9+1:", [right, wrong])
        preferred += min(scores[0].rewards) > scores[1].rewards[0]
    assert preferred >= 7 and scores[0].steps == right.split(STEP)
    wrong = "07+6=03\n\n03+1=04\n\n#04"
    [scored] = score_steps(result.directory, "7+6+1:", [wrong])
    ids = load_tokenizer("arithmetic")("7+6+1:" + wrong + STEP).input_ids
    with torch.no_grad():
        p = model(torch.tensor([ids]), use_cache=False).logits[0].double().softmax(-1)[[13, 21, 25]]
    r = p[:, 1] - p[:, 0]
    w = torch.exp(-10 * r) / torch.exp(-10 * r).sum()
    torch.testing.assert_close(torch.tensor(scored.rewards).double(), r, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(scored.weights).double(), w, rtol=0, atol=1e-3)
    assert scored.outcome == pytest.approx((w * r).sum().item(), abs=1e-3)


def test_what_is_measured_of_a_prm():
    """Two solutions of two steps by a PRM that says P(right) = .85, .35 and .65, .95, beside labels 1, 0 and 1, 0."""
    p = torch.tensor([0.85, 0.35, 0.65, 0.95])

    def prm(packed, step_ends):
        order = [0, 1, 2, 3] if packed.input_ids[0] == 2 else [2, 3, 0, 1]
        return torch.stack([(1 - p).log(), p.log()], -1)[order]

    solutions = [
        TokenSolution([2], [2, 5, 5], [0, 1], [True, False]),
        TokenSolution([3], [3, 5, 5], [0, 1], [True, False]),
    ]
    metrics, bins = evaluate_steps(prm, solutions, PRMConfig(data="d", out="o"))
    assert metrics.loss == pytest.approx(-(math.log(0.85) + math.log(0.65) + math.log(0.65) + math.log(0.05)) / 4)
    assert metrics[1:5] == (0.75, 0.5, 1.0, 0.5)
    assert metrics.calibration_error == pytest.approx((0.15 + 0.35 + 0.35 + 0.95) / 4)
    assert [bin.num_steps for bin in bins] == [1, 1, 1, 1]


def test_the_published_format_loads_and_others_are_refused(tmp_path):
    """transformers' own head of two labels with a bias, without our separator: PURE's."""
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    policy = load_policy("scratch:demo", tokenizer)
    save_checkpoint(policy, tokenizer, tmp_path / "policy")
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "policy", num_labels=2)
    save_checkpoint(theirs, tokenizer, tmp_path / "prm")
    model = load_prm(str(tmp_path / "prm"), tokenizer)
    assert torch.equal(model.score.bias, theirs.score.bias) and separator_of(model.config) == "\n"
    assert not any(p.requires_grad for p in backbone(model).parameters())
    save_checkpoint(load_token_model("scratch:demo", tokenizer), tokenizer, tmp_path / "q_rm")
    with pytest.raises(ValueError, match=r"must be a PRM, a token classifier with two labels, got Llama.*, 1"):
        load_prm(str(tmp_path / "q_rm"), tokenizer)
    theirs.score.bias.data[1] = torch.nan
    theirs.config.step_separator = STEP
    theirs.save_pretrained(tmp_path / "prm")
    with pytest.raises(ValueError, match="scores must be finite, got nan for step 1 of response 1"):
        score_steps(str(tmp_path / "prm"), "1+1:", ["01+1=02"])
