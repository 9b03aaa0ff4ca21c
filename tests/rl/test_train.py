"""The loop on models small enough for seconds: presets, bits, micro-batches, resuming, learning, bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import profile
from transformers import AutoModelForCausalLM

from qrm_fast import group_advantages, pack
from qrm_fast.rl import train as loop
from qrm_fast.rl.arithmetic import arithmetic_examples
from qrm_fast.rl.attention import packed_hidden
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.config import PRESETS, Config, preset
from qrm_fast.rl.data import Example, Prompt, write_jsonl
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rollout import TransformersEngine
from qrm_fast.rl.tokenizers import load_tokenizer
from qrm_fast.rl.train import PassAt1, train
from qrm_fast.rl.verifiers import VERIFIERS


@pytest.fixture
def config(checkpoints, tmp_path):
    return Config(
        model=str(checkpoints / "policy"),
        q_rm=str(checkpoints / "q_rm"),
        prm=str(checkpoints / "prm"),
        orm=str(checkpoints / "q_rm"),
        implicit=str(checkpoints / "implicit"),
        data=str(checkpoints / "prompts.jsonl"),
        out=str(tmp_path / "run"),
        overwrite=True,
        verifier="arithmetic",
        num_iterations=2,
        num_prompts=4,
        group_size=4,
        max_new_tokens=8,
        lr=1e-3,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_iteration_on_each_device(config, device, dtype):
    """The checks at the start hold there, with shared prompts, and what was sampled is what is trained."""
    config = replace(
        config, **preset("qrm-released", "ppo"), device=device, dtype=dtype, save_every=1, max_new_tokens=8
    )
    first, second = train(config).metrics
    assert first["perf/prefix_sharing"] > 0.1  # 0 where the device's attention cannot share
    assert all(math.isfinite(x) for row in (first, second) for x in row.values())
    for row in (first, second):
        limit = 1e-5 if dtype == "float32" else 0.1
        assert 0 < row["rollout/logratio_mean_abs"] <= row["rollout/logratio_max_abs"] <= limit
    assert (
        abs(first["policy/approx_kl"]) <= (1e-6 if dtype == "float32" else 5e-5) < abs(second["policy/approx_kl"]) + 1
    )


def test_the_engine_is_the_one_that_is_asked_for(config, monkeypatch):
    asked = []

    def engine(policy, stop_ids, **options):
        asked.append(options)
        return TransformersEngine(policy, stop_ids)

    monkeypatch.setattr(loop, "VLLMEngine", engine)
    write_jsonl(config.data + ".long", [Example("1+" * 40 + "1:", "41")])
    config = replace(config, eval_data=config.data + ".long", num_iterations=1, engine_cache_gib=2.0)
    train(config)
    assert not asked
    train(replace(config, engine="vllm"))
    assert asked == [{"max_len": 82 + config.max_new_tokens, "cache_gib": 2.0}]


def test_one_process_for_vllm_is_asked_for_before_anything_is_read(config, monkeypatch):
    config = replace(config, engine="vllm", model=f"{config.out}/nowhere")
    with pytest.raises((OSError, ValueError), match="nowhere"):
        train(config)
    monkeypatch.setattr(loop.ranks, "num_ranks", lambda: 2)
    with pytest.raises(ValueError, match='the engine "vllm" runs in one process, got 2'):
        train(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(("importance", "weight"), [("none", None), ("truncate-token", 1.05), ("mask-sequence", 0.0)])
def test_a_sampler_that_differs_is_measured_and_weighed(config, monkeypatch, importance, weight):
    """One that says log-probabilities a tenth too low, and of the first token of all four tenths, in each iteration."""

    class Low(TransformersEngine):
        checked = False

        def generate(self, *args, **options):
            rollout = super().generate(*args, **options)
            if self.checked:
                for logprobs in rollout.logprobs:
                    logprobs -= 0.1
                rollout.logprobs[0][0] -= 0.3
            self.checked = True
            return rollout

    monkeypatch.setattr(loop, "TransformersEngine", Low)
    config = replace(config, importance=importance, max_importance=1.05, algorithm="ppo", num_epochs=2)
    first, second = train(config).metrics
    for row in (first, second):
        num_tokens = row["response/length"] * config.num_prompts * config.group_size
        assert row["rollout/logratio_max_abs"] == pytest.approx(0.4, abs=1e-5)
        assert row["rollout/logratio_mean_abs"] == pytest.approx(0.1 + 0.3 / num_tokens, abs=1e-5)
        if weight is not None:
            assert row["rollout/importance_above"] == 1
            assert row["rollout/importance_mean"] == pytest.approx(weight)
    assert (first["policy/ratio"] > 1.05) == (importance == "none")
    assert (first["policy/grad_norm"] == 0) == (importance == "mask-sequence")


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def same_bits(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(("name", "algorithm"), PRESETS)
def test_presets_run_and_report(config, name, algorithm):
    steps = dict(num_epochs=2, num_minibatches=2) if algorithm == "ppo" else {}
    if name == "qrm-vocab":
        steps["q_rm"] = config.q_rm.replace("q_rm", "q_vocab")
    result = train(replace(config, **preset(name, algorithm), **steps))
    with open(result.directory + "/metrics.jsonl") as lines:
        rows = [json.loads(line) for line in lines]
    assert rows == result.metrics and [row["step"] for row in rows] == [1, 2]
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
    if name == "prime":  # it has moved by a millionth, if at all
        assert rows[1]["implicit/grad_norm"] > 0 and rows[1]["implicit/loss"] != rows[0]["implicit/loss"]
    if preset(name)["reward"] != "verifier":  # a fresh policy is never right: nothing to learn from
        assert rows[0]["policy/grad_norm"] > 0
        assert not same_bits(weights(result.directory), weights(config.model))
        assert algorithm == "ppo" or abs(rows[0]["policy/ratio"] - 1) < 1e-4


def test_the_presets_hold_what_the_sources_say():
    config = Config(model="m", data="d", out="o")
    assert replace(config, **preset("qrm-released")) == config  # what is not said is the released code's REINFORCE
    assert config.eos_rescore == "mean" and config.kl_coef == 0
    assert len({frozenset(values) for values in PRESETS.values()}) == 1  # no preset leaves a field to another
    released = replace(config, **preset("qrm-released", "ppo"))
    assert (released.kl_coef, released.kl_estimator, released.kl_in) == (0.01, "abs", "reward")
    assert (released.value_coef, released.value_normalize, released.center) == (0.01, True, False)
    paper = replace(config, **preset("qrm-paper", "ppo"))
    assert (paper.center, paper.value_coef, paper.value_normalize, paper.kl_estimator) == (True, 1.0, False, "k1")
    pure = {name: replace(config, **preset(f"pure-{name}", "ppo")) for name in ("paper", "openrlhf", "verl")}
    assert {(x.reward, x.kl_coef, x.kl_in, x.operator, x.process_temperature) for x in pure.values()} == {
        ("pure", 0.001, "reward", "soft", 0.1)
    }
    assert [(x.process, x.kl_estimator, x.loss_mode) for x in pure.values()] == [
        ("paper", "k1", "token-mean"),
        ("openrlhf", "k1", "seq-mean-token-mean"),
        ("verl", "k3", "token-mean"),
    ]
    for name, algorithm in (("qrm", "reinforce"), ("rloo", "trpo")):
        with pytest.raises(
            ValueError,
            match=f"one of qrm-released, .*, prime, rloo, grpo, dr-grpo and .* one of reinforce, ppo, got {name} and",
        ):
            preset(name, algorithm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_config_same_bits_and_resuming_loses_none(config, dtype):
    """PPO with critic, reference, Q-RM and mini-batches: three iterations at once, and two with one more resumed."""
    config = replace(config, **preset("qrm-released", "ppo"), num_epochs=2, num_minibatches=2, lr=1e-4)
    config = replace(config, num_iterations=3, save_every=2)
    config = replace(config, eval_data=config.data, dtype=dtype)
    whole = train(config)
    resumed = replace(config, out=config.out + "2")
    train(replace(resumed, num_iterations=2))
    assert not same_bits(weights(resumed.out), weights(whole.directory))
    with open(resumed.out + "/metrics.jsonl", "a") as lines:
        lines.write('{"step": 3, "resp')  # what a crash leaves behind
    resumed = replace(resumed, overwrite=False)
    with pytest.raises(ValueError, match="seed must be that of the state, 0, got 1"):
        train(replace(resumed, resume=True, seed=1))
    with pytest.raises(ValueError, match="num_iterations must be at least the 2 done, got 1"):
        train(replace(resumed, resume=True, num_iterations=1))
    again = train(replace(resumed, resume=True))
    assert same_bits(weights(resumed.out), weights(whole.directory))
    untimed = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in result.metrics]
        for result in (whole, again)
    ]
    assert [row["step"] for row in untimed[1]] == [0, 1, 2, 3]
    assert untimed[0][3] == untimed[1][3]
    assert whole.before is not None and whole.after == again.after


def gradients_of(config, monkeypatch):
    recorded, step = [], AdamW.step

    def recording_step(optimizer, lr, max_grad_norm):
        recorded.append(torch.cat([p.grad.flatten() for p in optimizer.parameters]))
        return step(optimizer, lr, max_grad_norm)

    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "step", recording_step)
        train(replace(config, num_iterations=1))
    return recorded


@pytest.mark.parametrize("loss_mode", ["token-mean", "seq-mean-token-sum-norm"])
def test_gradient_does_not_depend_on_the_microbatches(config, monkeypatch, loss_mode):
    config = replace(config, **{**preset("qrm-paper", "ppo"), "loss_mode": loss_mode})
    whole = gradients_of(config, monkeypatch)
    pieces = gradients_of(replace(config, max_tokens=45), monkeypatch)
    assert len(whole) == len(pieces) == 2  # policy and critic
    for a, b in zip(whole, pieces, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def largest_allocation(function):
    with profile(profile_memory=True) as record:
        function()
    return max(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")


def test_an_update_never_holds_logits(config, checkpoints):
    """The demo model with 32,768 tokens: no allocation as large as its logits of the action rows in 16 bits."""
    num_words = 32768
    model = load_policy(str(checkpoints / "policy"), load_tokenizer("arithmetic"))
    model.resize_token_embeddings(num_words, mean_resizing=False)
    policy = Policy(model)
    optimizer = AdamW(policy.parameters())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(num_words, (30, 48), generator=generator).tolist()
    batch = pack(rows, [8] * len(rows))
    num_actions = len(batch.action_index)

    def update():
        policy.loss(batch, torch.ones(num_actions), entropy_coef=0.1).loss.backward()
        optimizer.step(1e-3, 1.0)

    def naive():
        packed_hidden(model, batch)[batch.action_index] @ model.lm_head.weight.T

    assert largest_allocation(update) < num_actions * num_words * 2
    with torch.no_grad():
        assert largest_allocation(naive) >= num_actions * num_words * 2


def test_answers_without_an_advantage_change_nothing(config, monkeypatch):
    """A group with equal rewards is dropped before packing; the others' gradient is what it would have been."""
    monkeypatch.setitem(VERIFIERS, "ends early", lambda response, label: len(response) < 5)
    config = replace(config, **preset("rloo"), verifier="ends early", num_prompts=16, max_new_tokens=12)
    [dropped] = gradients_of(config, monkeypatch)
    monkeypatch.setattr(
        "qrm_fast.rl.rewards.verifier.group_advantages",
        lambda *args, **options: group_advantages(*args, **options) + 1e-30,
    )
    [kept] = gradients_of(config, monkeypatch)
    assert dropped.norm() > 0
    assert (dropped - kept).norm() <= 1e-5 * kept.norm()


def test_every_answer_keeps_its_entropy_and_kl(config, monkeypatch):
    """No answer has an advantage: what is left to train on is the regularisation of all of them."""
    monkeypatch.setitem(VERIFIERS, "nothing", lambda response, label: False)
    config = replace(config, **preset("rloo"), verifier="nothing", max_grad_norm=1e9)
    [entropy] = gradients_of(replace(config, entropy_coef=1.0), monkeypatch)
    [random] = gradients_of(replace(config, reward="random", entropy_coef=1e6), monkeypatch)
    assert (1e6 * entropy - random).norm() <= 1e-4 * random.norm()
    rows = train(replace(config, entropy_coef=1.0, kl_coef=0.1)).metrics
    assert rows[1]["policy/ref_kl"] > 1e-6  # the first update has moved all answers off the reference


def test_metrics_are_means_over_the_tokens_trained_on(config, monkeypatch):
    monkeypatch.setitem(VERIFIERS, "ends early", lambda response, label: len(response) < 5)
    config = replace(
        config, **preset("rloo"), verifier="ends early", num_prompts=8, max_new_tokens=12, num_iterations=1
    )
    for options in {}, {"num_minibatches": 3}, {"num_minibatches": 100}, {"loss_mode": "seq-mean-token-sum"}:
        [row] = train(replace(config, lr=0.0, **options)).metrics
        assert row["policy/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert row["policy/ratio_max"] == pytest.approx(1.0, abs=1e-3)


def test_minibatches_share_the_weight_of_all_answers(config, monkeypatch):
    """The gradients of an epoch's updates, at one policy, add up to what one update would have."""
    config = replace(config, lr=0.0, num_prompts=3)
    [whole] = gradients_of(config, monkeypatch)
    for num_minibatches in 5, 100:  # 12 answers
        parts = gradients_of(replace(config, num_minibatches=num_minibatches), monkeypatch)
        assert len(parts) == min(num_minibatches, 12)
        mean = torch.stack(parts).mean(0)
        assert (mean - whole).norm() <= 1e-4 * whole.norm()


def test_the_verifier_teaches_a_fresh_policy_to_stop(config, monkeypatch):
    monkeypatch.setitem(VERIFIERS, "anything", lambda response, label: True)
    config = replace(config, **preset("rloo"), verifier="anything", num_iterations=12, num_prompts=16, max_new_tokens=4)
    result = train(replace(config, lr=3e-3, eval_data=config.data, eval_every=100, eval_samples=4))
    assert result.before.sampled < 0.5
    assert result.after.sampled > 0.9


def test_the_policy_climbs_its_q_rm(config):
    config = replace(config, **preset("qrm-paper"), num_iterations=12, num_prompts=16, lr=1e-3)
    rows = train(config).metrics
    gain = rows[-1]["reward/q_mean"] - rows[0]["reward/q_mean"]
    assert gain > 0.5 * rows[0]["reward/q_std"]


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
@pytest.mark.parametrize("options", [
    dict(estimator="min-gae", lam=0.9),
    dict(estimator="gae", reward="pure=1.0,verifier=1.0"),
    dict(reward="pure=1.0,verifier=0.5", labelled_share=0.5, operator="revmin", process="verl"),
    dict(reward="q-rm=1.0,pure=0.5,verifier=2.0,random=0.1", num_epochs=2, num_minibatches=2),
    dict(reward="verifier", estimator="gae", kl_coef=0.1),
    dict(reward="orm=1.0,implicit=0.5,verifier=1.0", estimator="gae", kl_coef=0.1),
    dict(reward="orm,verifier", value_coef=0.5, kl_in="reward"),
    dict(operator="sum", kl_in="loss", kl_estimator="k2"),
])  # fmt: skip
def test_mixtures_and_critics_run_and_report(config, algorithm, options):
    config = replace(config, **preset("pure-paper", algorithm))
    rows = train(replace(config, **options)).metrics
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
    assert rows[0]["policy/grad_norm"] > 0
    if "pure" in options.get("reward", "pure"):
        assert {"reward/process", "process/one_step", "process/short"} <= rows[0].keys()
        assert ("process/short_mass" in rows[0]) == (options.get("estimator") != "gae")
        assert rows[0]["process/short"] <= 1 and 1 <= rows[0]["process/num_steps"] <= 8


def test_a_mixture_resumes_to_the_same_bits_and_the_same_labels(config, monkeypatch):
    judged = []
    monkeypatch.setitem(VERIFIERS, "by label", lambda response, label: bool(response) and not judged.append(label))
    mixture = dict(reward="pure=1.0,q-rm=0.5,verifier=1.0", labelled_share=0.25, verifier="by label")
    config = replace(config, **{**preset("pure-paper"), **mixture}, num_iterations=4, save_every=2)
    whole = train(config)
    assert len(set(judged)) <= 4 < 16  # a quarter of 16 prompts is asked about
    train(replace(config, num_iterations=2, out=config.out + "2"))
    train(replace(config, out=config.out + "2", overwrite=False, resume=True))
    assert same_bits(weights(config.out + "2"), weights(whole.directory))


@pytest.mark.parametrize("start", ["policy", "implicit"])
def test_an_implicit_reward_model_that_learns_resumes_to_the_same_bits(config, monkeypatch, start):
    monkeypatch.setitem(VERIFIERS, "ends early", lambda response, label: len(response) < 5)
    config = replace(config, **{**preset("prime"), "implicit_lr": 1e-3}, verifier="ends early", num_prompts=16)
    config = replace(config, implicit=config.implicit if start == "implicit" else None)
    config = replace(config, num_iterations=6, save_every=3, max_tokens=90)
    whole = train(config)
    losses = [row["implicit/loss"] for row in whole.metrics]
    assert losses[-1] < losses[0] - 0.05 and (losses[0] == pytest.approx(math.log(2))) == (start == "policy")
    train(replace(config, num_iterations=3, out=config.out + "2"))
    again = train(replace(config, out=config.out + "2", overwrite=False, resume=True))
    assert same_bits(weights(config.out + "2"), weights(whole.directory))
    assert [row["implicit/loss"] for row in again.metrics] == losses


@pytest.mark.parametrize("options", [
    dict(estimator="gae"),
    dict(reward="implicit=2.0,verifier=1.0,pure=0.5", labelled_share=0.5),
    dict(kl_coef=0.1, kl_in="reward", kl_estimator="k1", lora_rank=2, implicit=None),
])  # fmt: skip
def test_an_implicit_reward_model_that_learns_goes_with_the_rest(config, monkeypatch, options):
    monkeypatch.setitem(VERIFIERS, "ends early", lambda response, label: len(response) < 5)
    config = replace(config, **{**preset("prime", "ppo"), **options}, verifier="ends early")
    rows = train(config).metrics
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
    assert rows[0]["policy/grad_norm"] > 0 and rows[0]["implicit/grad_norm"] > 0


def test_an_implicit_reward_model_that_cannot_learn_is_refused(config):
    config = replace(config, **preset("prime"))
    for reward in ("implicit", "verifier", "q-rm,verifier"):
        with pytest.raises(ValueError, match=f'implicit_lr fits the reward "implicit" .* got "{reward}"'):
            train(replace(config, reward=reward))
    with pytest.raises(ValueError, match="value_coef needs the token scores of one model that stays"):
        train(replace(config, value_coef=0.1))
    with pytest.raises(ValueError, match='reward "implicit" needs implicit, the directory of a trained implicit'):
        train(replace(config, implicit_lr=0.0, implicit=None))


def test_the_policy_climbs_its_prm(config):
    config = replace(config, **preset("pure-paper"), num_iterations=12, num_prompts=16, lr=1e-3)
    rows = train(replace(config, kl_coef=0.0)).metrics
    assert rows[-1]["reward/process"] > rows[0]["reward/process"] + 0.02


def test_prompts_without_a_label_are_for_mixtures(config, tmp_path):
    rows = [*arithmetic_examples(8, split="train", seed=0), *(Prompt(f"{i}+1+1+1:") for i in range(1, 9))]
    write_jsonl(tmp_path / "some.jsonl", rows)
    config = replace(config, data=str(tmp_path / "some.jsonl"), num_prompts=16, max_new_tokens=4)
    train(replace(config, **{**preset("pure-paper"), "reward": "pure=1.0,verifier=1.0"}))
    with pytest.raises(ValueError, match=r"some.jsonl:9: expected a string field 'label'"):
        train(replace(config, **preset("rloo")))


def test_a_credit_that_is_not_finite_names_the_prompt(config, checkpoints, tmp_path):
    tokenizer = load_tokenizer("arithmetic")
    prm = load_token_model(config.prm, tokenizer, num_labels=2)
    prm.score.weight.data[0, 3] = torch.nan
    prm.save_pretrained(tmp_path / "prm")  # what `save_checkpoint` would refuse
    tokenizer.save_pretrained(tmp_path / "prm")
    config = replace(config, **preset("pure-paper"), prm=str(tmp_path / "prm"), max_skipped=0)
    with pytest.raises(FloatingPointError, match=r"the credit of 16 answers is not, the first is to .*prompts.jsonl:"):
        train(config)
    assert not (tmp_path / "run/config.json").exists()


def test_passes_end_where_the_policy_has_moved_far_enough(config):
    config = replace(config, **preset("qrm-released", "ppo"), num_epochs=4, num_minibatches=2)
    far, near = (train(replace(config, target_kl=kl)).metrics for kl in (1e-9, 1e9))
    assert [row["policy/epochs"] for row in far] == [1, 1] and [row["policy/epochs"] for row in near] == [4, 4]
    assert near == untimed(train(config).metrics, near)


def untimed(rows, others):
    """`rows` with the times of `others`."""
    pairs = zip(rows, others, strict=True)
    return [row | {k: x for k, x in other.items() if k.startswith(("time/", "perf/"))} for row, other in pairs]


def test_the_best_of_the_evaluations_is_kept(config, monkeypatch):
    scores = iter([0.9, 0.2, 0.5, 0.4, 0.5, 0.5, 0.6])
    kept = []

    def evaluated(*_):
        return PassAt1(0.0, next(scores))

    def saved(model, tokenizer, directory):
        kept.append(Path(directory).name)
        save_checkpoint(model, tokenizer, directory)

    monkeypatch.setattr(loop, "evaluate", evaluated)
    monkeypatch.setattr(loop, "save_checkpoint", saved)
    config = replace(config, reward="random", eval_data=config.data, eval_every=1, num_iterations=4, save_every=1)
    result = train(config)
    assert kept == ["best", "best", "run"]  # not the start, 0.2, 0.5
    assert (result.before.sampled, result.after.sampled) == (0.9, 0.5)
    best = weights(config.out + "/best")
    assert not same_bits(best, weights(config.out))
    train(replace(config, num_iterations=6, resume=True, overwrite=False))
    assert kept[3:] == ["best", "run"] and same_bits(weights(config.out + "/best"), weights(config.out))
    monkeypatch.undo()
    train(replace(config, eval_data=None))  # another run, of which none was evaluated
    assert not Path(config.out, "best").exists()


def test_what_the_device_computes_is_reported(config):
    [_, row] = train(replace(config, peak_tflops=0.5)).metrics
    assert row["perf/update_mfu"] == pytest.approx(row["perf/update_tflops_per_s"] / 0.5)
    assert 0 < row["perf/update_tflops_per_s"] < 1 and 0 < row["perf/microbatch_fill"] < 1


def test_random_reward_needs_no_q_rm(config):
    result = train(replace(config, q_rm=None, reward="random"))
    assert result.metrics[0]["policy/grad_norm"] > 0


def test_bad_input(config, tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        Config(model="m", data="d", out="o", learning_rate=1.0)
    with pytest.raises(ValueError, match='reward "q-rm" needs q_rm, the directory of a trained Q-RM, got None'):
        train(replace(config, q_rm=None))
    with pytest.raises(ValueError, match="must be a Q-RM, a token classifier with one label, got LlamaForCausalLM"):
        train(replace(config, q_rm=config.model))
    with pytest.raises(ValueError, match='reward "pure" needs prm, the directory of a trained PRM, got None'):
        train(replace(config, **preset("pure-paper"), prm=None))
    with pytest.raises(ValueError, match=r"must be a PRM, a token classifier with two labels, got Llama.*, 1"):
        train(replace(config, **preset("pure-paper"), prm=config.q_rm))
    with pytest.raises(ValueError, match=r"labelled_share is for a mixture with the verifier, expected 1, got 0\.5"):
        train(replace(config, **preset("rloo"), labelled_share=0.5))
    with pytest.raises(ValueError, match="reward must name one kind of Q-RM, for there is one q_rm, got q-rm,qr"):
        train(replace(config, reward="q-rm,qrm-vocab"))
    with pytest.raises(ValueError, match="value_coef needs the token scores of one model"):
        train(replace(config, reward="q-rm,orm", value_coef=1.0))
    q_rm = load_token_model(config.q_rm, load_tokenizer("arithmetic"))
    for name, other in (("q_rm", "orm"), ("orm", "qrm")):
        q_rm.config.reward_model = other
        save_checkpoint(q_rm, load_tokenizer("arithmetic"), tmp_path / other)
        with pytest.raises(ValueError, match=f"got a model that was trained with --kind {other}"):
            train(replace(config, **preset(name.replace("q_rm", "qrm-paper")), **{name: str(tmp_path / other)}))
    with pytest.raises(ValueError, match="must be a Q-RM with a vocabulary head, got a model that was not"):
        train(replace(config, **preset("qrm-vocab"), q_rm=config.model))
    with pytest.raises(ValueError, match="must be an implicit reward model, which names its reference, got one"):
        train(replace(config, **preset("dpo-rm"), implicit=config.model))
    with pytest.raises(ValueError, match='estimator "gae" sums rewards, which q-rm has none of, got "q-rm"'):
        train(replace(config, estimator="gae"))
    with pytest.raises(ValueError, match='estimator "min-gae" is for the steps of the reward "pure", got "verifier"'):
        train(replace(config, **{**preset("rloo"), "estimator": "min-gae"}))
    with pytest.raises(ValueError, match='expected kl_in "loss" with reward "verifier"'):
        train(replace(config, **{**preset("rloo"), "kl_coef": 0.1, "kl_in": "reward"}))
    with pytest.raises(
        ValueError, match=r'value_coef needs the token scores of one model .* expected 0 with reward "verifier", got 0'
    ):
        train(replace(config, **{**preset("rloo"), "value_coef": 0.5}))
    with pytest.raises(ValueError, match=r'overlong_tokens are for the reward "verifier" .* "q-rm", got 3'):
        train(replace(config, overlong_tokens=3))
    with pytest.raises(ValueError, match="overlong_tokens must be at most max_new_tokens, 8, got 9"):
        train(replace(config, **preset("rloo"), overlong_tokens=9))
    with pytest.raises(ValueError, match="top_entropy must leave some token, expected above 0, got 0"):
        train(replace(config, top_entropy=0.0))
    with pytest.raises(ValueError, match=r"target_kl ends passes .*, expected 0 with 1 of them, got 0\.1"):
        train(replace(config, target_kl=0.1))
    with pytest.raises(ValueError, match="verifier must be one of arithmetic, number, math, got judge"):
        train(replace(config, **preset("rloo"), verifier="judge"))
    with pytest.raises(
        ValueError, match="max_tokens must hold the longest prompt and max_new_tokens, 20 tokens, got 17"
    ):
        train(replace(config, max_tokens=17))
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl"):
        train(replace(config, data=str(tmp_path / "missing.jsonl")))
    for name in ("eval_every", "eval_samples", "num_minibatches", "num_iterations"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            train(replace(config, **{name: 0}))
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        train(replace(config, temperature=0.0))
    with pytest.raises(ValueError, match=r"loss_mode must be one of token-mean, .*, got mean"):
        train(replace(config, loss_mode="mean"))
    with pytest.raises(ValueError, match='"abs" exists in the reward only'):
        train(replace(config, **{**preset("qrm-released", "ppo"), "kl_in": "loss"}))
    with pytest.raises(ValueError, match="must fit the 2048 positions of LlamaForCausalLM, got 2060"):
        train(replace(config, max_new_tokens=2048))
    write_jsonl(tmp_path / "eval.jsonl", [Example("1" + 1020 * "+1" + ":", "00")])
    with pytest.raises(ValueError, match="must fit the 2048 positions of LlamaForCausalLM, got 2050"):
        train(replace(config, eval_data=str(tmp_path / "eval.jsonl")))
    with pytest.raises(ValueError, match="must be a causal language model, got LlamaForTokenClassification"):
        train(replace(config, model=config.q_rm))
    with pytest.raises(FileNotFoundError, match="must hold a state to go on from"):
        train(replace(config, resume=True, overwrite=False))
    write_jsonl(tmp_path / "prompts.jsonl", [Example("1+1:", "02")])
    with open(tmp_path / "prompts.jsonl", "a") as lines:
        lines.write("{\n")
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: expected one JSON object per line"):
        train(replace(config, data=str(tmp_path / "prompts.jsonl")))


@pytest.mark.parametrize(
    ("name", "field", "num_labels"),
    [("qrm-paper", "q_rm", 1), ("pure-paper", "prm", 2), ("orm", "orm", 1), ("dpo-rm", "implicit", 1),
     ("prime", "implicit", 1)],
)  # fmt: skip
def test_a_reward_model_of_another_vocabulary_is_refused(config, tmp_path, name, field, num_labels):
    other = load_tokenizer("bpe", ["1+1"])
    save_checkpoint(load_token_model("scratch:demo", other, num_labels=num_labels), other, tmp_path / "other")
    with pytest.raises(ValueError, match="policy and reward model must share one vocabulary, got 18 and"):
        train(replace(config, **preset(name), **{field: str(tmp_path / "other")}))


@pytest.mark.parametrize("where", ["data", "eval_data"])
@pytest.mark.parametrize(("verifier", "label"), [("arithmetic", "x"), ("number", "2 and 3"), ("number", "")])
def test_a_label_that_cannot_be_judged_by_stops_a_run_before_a_model_is_loaded(
    config, tmp_path, monkeypatch, where, verifier, label
):
    rows = arithmetic_examples(9, split="train", seed=0)
    write_jsonl(tmp_path / "badlabel.jsonl", [*rows, Example("1+1:", label)])
    monkeypatch.setattr("qrm_fast.rl.train.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    config = replace(config, **preset("rloo"), verifier=verifier, **{where: str(tmp_path / "badlabel.jsonl")})
    with pytest.raises(ValueError, match=r"badlabel.jsonl:10: label must be"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("padded", ["policy", "q_rm", "both"])
def test_embeddings_may_be_padded_beyond_the_tokenizer(config, checkpoints, tmp_path, padded):
    """No id without a token is sampled, so none reaches a model that embeds fewer."""
    tokenizer = load_tokenizer("arithmetic")
    for name, load in (("policy", load_policy), ("q_rm", load_token_model)):
        model = load(str(checkpoints / name), tokenizer)
        if padded in (name, "both"):
            model.resize_token_embeddings(481, mean_resizing=False)
            model.get_input_embeddings().weight.data[17:] = 5.0  # what a head without the limit would sample
        save_checkpoint(model, tokenizer, tmp_path / name)
    config = replace(config, model=str(tmp_path / "policy"), q_rm=str(tmp_path / "q_rm"), temperature=5.0)
    rows = train(replace(config, eval_data=config.data, lr=1e-5)).metrics
    assert rows[1]["policy/ratio"] == pytest.approx(1.0, abs=1e-4)
