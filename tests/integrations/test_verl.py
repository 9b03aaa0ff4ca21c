"""The verl plugins against verl's own functions, engine, reward loop and configuration: `make test-verl`."""

import importlib.util

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed here: make test-verl", allow_module_level=True)

import asyncio
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import verl_on_cpu  # isort: split  its environment has to be there before verl
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.agent_loop import agent_loop
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as linear_cross_entropy_module
from verl.workers.utils.losses import ppo_loss

import qrm_fast
from qrm_fast.integrations.verl.hooks import HOOKS, HookMoved
from qrm_fast.integrations.verl.losses import LOSSES
from qrm_fast.rl.arithmetic import arithmetic_tokenizer
from qrm_fast.rl.models import load_token_model

ROOT = Path(__file__).parents[2]
GLOBAL = dict(dp_size=4, batch_num_tokens=731, global_batch_size=37, loss_scale_factor=50)
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


theirs = verl_on_cpu.untouched(core_algos)


def batch(seed=0, num_answers=9, width=24):
    """Rewards, values, mask and prompts of padded answers: one empty, one full, most with holes; nothing on padding."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, num_answers, width, generator=generator)
    lengths = torch.randint(1, width, (num_answers,), generator=generator)
    lengths[0], lengths[1] = 0, width
    mask = torch.arange(width) < lengths[:, None]
    mask &= torch.rand(mask.shape, generator=generator) > 0.25
    prompts = np.array(["a", "b", "a", "c", "b", "a", "b", "lone", "c"][:num_answers], dtype=object)
    return rewards * mask, values * mask, mask.long(), prompts


def assert_same(got, want, mask=None):
    if mask is not None:
        assert not got[mask == 0].any()
        got, want = got[mask != 0], want[mask != 0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def python(code, **environment):
    command = [sys.executable, "-c", code]
    environment = {"VERL_PLATFORM": "nvidia"} | environment
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "plugins, named, faster", [("auto", True, True), ("qrm_fast", True, False), ("none", False, False)]
)
def test_import_verl_loads_the_plugins_that_are_asked_for_and_nothing_heavy(plugins, named, faster):
    code = """
import sys, verl
print("verl.trainer.ppo.core_algos" in sys.modules)
from verl.trainer.ppo import core_algos
print("qrm_min_form" in core_algos.ADV_ESTIMATOR_REGISTRY, "qrm_ppo" in core_algos.POLICY_LOSS_REGISTRY)
print(core_algos.compute_gae_advantage_return.__module__.startswith("qrm_fast"))
from verl.utils.experimental.torch_functional import FusedLinearForPPO
print(FusedLinearForPPO.forward.__module__.startswith("qrm_fast"))
"""
    got = python(code, VERL_USE_EXTERNAL_PLUGINS=plugins)
    assert got == [str(x) for x in (False, named, named, faster, faster)]


def test_a_benchmark_has_verl_as_it_comes():
    code = f"""
import sys
sys.path.append({str(ROOT)!r})
from bench.rivals import verl_chunked
print(verl_chunked().forward.__module__)
"""
    assert python(code) == ["verl.utils.experimental.torch_functional"]


def test_installing_beside_verl_changed_nothing():
    before = set((Path(sys.prefix) / "before.txt").read_text().splitlines())
    now = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True).stdout.splitlines()
    assert not before - set(now)
    assert [line.split()[0] for line in set(now) - before] == ["qrm_fast"]


def test_check_says_what_is_there():
    command = [sys.executable, "-m", "qrm_fast.integrations.verl", "check"]
    environment = os.environ | {"VERL_PLATFORM": "nvidia"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" loaded") == 3 + len(HOOKS)
    assert re.search(r"gae +csrc/cpu/gae.cpp", done.stdout)


MOVED = [
    ("verl.trainer.ppo.core_algos", "register_adv_est"),
    ("verl.trainer.ppo.core_algos", "compute_rloo_outcome_advantage"),
    ("verl.trainer.ppo.core_algos", "register_policy_loss"),
    ("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla"),
    ("verl.trainer.ppo.core_algos", "compute_gae_advantage_return"),
    ("verl.trainer.ppo.ray_trainer", "compute_advantage"),
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO.forward"),
    ("verl.utils.kernel.linear_cross_entropy", "LinearCrossEntropy.forward"),
    ("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead.forward_step"),
    ("verl.workers.engine.fsdp.transformer_impl", "EngineRegistry.register"),
    ("verl.experimental.reward_loop.reward_manager.naive", "NaiveRewardManager.run_single"),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopOutput.as_dict"),
]


@pytest.mark.parametrize("module, name", MOVED)
def test_a_moved_name_raises_with_its_name(module, name, monkeypatch):
    module = importlib.import_module(module)
    owner, _, attribute = name.rpartition(".")
    target = getattr(module, owner) if owner else module
    monkeypatch.setattr(target, attribute, lambda something_else: None)
    with pytest.raises(HookMoved, match=rf"{re.escape(name)} of verl 0.9.1 must take"):
        for hook in HOOKS[module.__name__]:
            hook.change(module)


def test_every_module_that_is_changed_has_its_moved_names():
    assert {module for module, _ in MOVED} == set(HOOKS)


def test_a_verl_that_is_not_known_is_refused(monkeypatch):
    from qrm_fast.integrations.verl import hooks

    for version in ("0.8.0", "0.10.0"):
        monkeypatch.setattr(hooks, "version", lambda version=version: version)
        with pytest.raises(ImportError, match=f"0.9.1 or newer and before 0.10, got {version}"):
            hooks.check_version()


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.97, 0.9)])
@pytest.mark.parametrize("seed", range(3))
def test_gae_is_verls(gamma, lam, seed):
    rewards, values, mask, _ = batch(seed)
    got = core_algos.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    want = theirs.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    assert core_algos.compute_gae_advantage_return is not theirs.compute_gae_advantage_return
    for x, y in zip(got, want, strict=True):
        assert_same(x, y, mask)


@pytest.mark.parametrize("name, normed", [("rloo", True), ("grpo", True), ("grpo", False)])
@pytest.mark.parametrize("seed", range(3))
def test_group_estimators_are_verls(name, normed, seed):
    rewards, _, mask, prompts = batch(seed)
    config = AlgoConfig(norm_adv_by_std_in_grpo=normed)
    options = {"norm_adv_by_std_in_grpo": normed} if name == "grpo" else {}
    want = theirs.ADV_ESTIMATOR_REGISTRY[name](rewards.clone(), mask, prompts, **options)
    got = core_algos.get_adv_estimator_fn(f"qrm_{name}")(rewards, mask, config=config, index=prompts)
    for x, y in zip(got, want, strict=True):
        assert_same(x, y, mask)


def algorithm(**qrm):
    return OmegaConf.create({"gamma": 0.97, "lam": 0.9, "use_kl_in_reward": False, "qrm": qrm})


def test_min_form_of_a_row_worked_by_hand():
    # Steps end at the rewarded tokens and at the last trainable one; the reward behind it counts there.
    rewards = torch.tensor([[0.0, 0.5, 0.0, -0.2, 0.0, 0.9], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    run = partial(core_algos.get_adv_estimator_fn("qrm_min_form"), rewards, mask, index=None)
    w = torch.tensor([0.5, -0.2, 0.9]).mul(-10).softmax(0)
    soft = (w * torch.tensor([0.5, -0.2, 0.9])).flip(0).cumsum(0).flip(0)
    rows = {
        "soft": soft.tolist(),
        "hard": [-0.2, -0.2, 0.0],
        "revmin": [-0.2, -0.2, 0.9],
    }
    for operator, (first, second, third) in rows.items():
        advantages, returns = run(config=algorithm(operator=operator))
        want = torch.tensor([[first, first, 0, second, third, 0], [0] * 6])
        torch.testing.assert_close(advantages, want, rtol=1e-6, atol=1e-6)
        assert returns is advantages or torch.equal(returns, advantages)
    causal, _ = run(config=algorithm(operator="causal_soft", temperature=0.0))
    torch.testing.assert_close(causal, run(config=algorithm(operator="revmin"))[0])
    torch.testing.assert_close(run()[0], run(config=algorithm())[0])


@pytest.mark.parametrize("outcomes", [True, False])
def test_pure_reads_two_streams(outcomes):
    """Process rewards where steps end, the outcome on the last token; the last step reaches to the end."""
    rewards = torch.zeros(3, 6)
    rewards[0, 1], rewards[0, 3], rewards[0, 4] = 0.5, -0.2, 1.0
    rewards[1, 2], rewards[1, 5] = 0.7, 0.0
    rewards[2, 0] = 1.0
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    prompts = np.array(["p", "p", "p"], dtype=object)
    options = dict(preset="paper", max_gen_len=6)
    config = algorithm(**options, outcomes=outcomes)
    got, _ = core_algos.get_adv_estimator_fn("qrm_pure")(rewards, mask, config=config, index=prompts)
    cu_seqlens, ids = torch.tensor([0, 5, 10, 11]), torch.zeros(3, dtype=torch.int64)
    if outcomes:
        steps, ends = torch.tensor([0.5, -0.2, 0.7]), torch.tensor([1, 4, 9])
        given = dict(outcome_rewards=torch.tensor([1.0, 0.0, 1.0]))
    else:
        steps, ends, given = torch.tensor([0.5, -0.2, 1.0, 0.7, 1.0]), torch.tensor([1, 3, 4, 9, 10]), {}
    want = qrm_fast.process_advantages(steps, ends, cu_seqlens, ids, **options, **given)
    torch.testing.assert_close(got[mask != 0], want)
    assert not got[mask == 0].any()


def test_q_normalises_the_scores():
    scores, _, mask, prompts = batch()
    sent = scores + 5.0 * (mask == 0)  # as of a tool's tokens, which the reward manager scores, too
    run = partial(core_algos.get_adv_estimator_fn("qrm_q"), sent, mask, index=prompts)
    rows = scores[mask != 0]
    got, _ = run(config=algorithm(center=True))
    torch.testing.assert_close(got[mask != 0], (rows - rows.mean()) / rows.std(correction=0), rtol=1e-5, atol=1e-5)
    group = torch.tensor([p == "b" for p in prompts])[:, None] & (mask != 0)
    got, _ = run(config=algorithm(center=True, scope="group"))
    want = (scores[group] - scores[group].mean()) / scores[group].std(correction=0)
    torch.testing.assert_close(got[group], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qrm_min_form", "qrm_pure", "qrm_q", "qrm_rloo", "qrm_grpo", "qrm_gae"])
def test_verls_trainer_calls_the_estimators(name):
    """Through the function of its V1 trainer, with what that hands over."""
    rewards, values, mask, prompts = batch()
    qrm = dict(max_gen_len=24) if name == "qrm_pure" else {}
    data = DataProto.from_dict(
        {"token_level_rewards": rewards, "response_mask": mask, "values": values}, non_tensors={"uid": prompts}
    )
    config = algorithm(**qrm)
    options = dict(batch_keys=None, gamma=config.gamma, lam=config.lam, config=config)
    data = compute_advantage_for_multi_trajectories(data, adv_estimator=name, **options)
    assert data.batch["advantages"].isfinite().all() and data.batch["advantages"].any()
    if name == "qrm_gae":
        want = theirs.compute_gae_advantage_return(rewards, values, mask, config.gamma, config.lam)
        assert_same(data.batch["advantages"], want[0], mask)
        assert_same(data.batch["returns"], want[1], mask)


def test_estimators_refuse_in_sentences():
    rewards, _, mask, prompts = batch()
    estimator = core_algos.get_adv_estimator_fn
    with pytest.raises(ValueError, match="use_kl_in_reward must be False"):
        estimator("qrm_min_form")(rewards, mask, config=AlgoConfig(use_kl_in_reward=True), index=prompts)
    with pytest.raises(ValueError, match=r"algorithm\.qrm takes operator, temperature here, got operators"):
        estimator("qrm_min_form")(rewards, mask, config=algorithm(operators="hard"), index=prompts)
    with pytest.raises(ValueError, match=r"critic\.enable=True"):
        estimator("qrm_gae")(rewards, mask, config=algorithm(), index=prompts)
    with pytest.raises(ValueError, match="`uid`"):
        estimator("qrm_rloo")(rewards, mask, config=algorithm())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, GLOBAL])
@pytest.mark.parametrize("kind, name", [("ppo", "vanilla"), ("cispo", "cispo"), ("gspo", "gspo")])
def test_losses_are_verls(kind, name, mode, info):
    generator = torch.Generator().manual_seed(1)
    advantages, _, mask, _ = batch()
    log_prob = -torch.rand(mask.shape, generator=generator)
    old = log_prob + 0.4 * torch.randn(mask.shape, generator=generator)
    old[1, 3] = log_prob[1, 3] - 25 if kind != "gspo" else old[1, 3]  # past the clamp of the log-ratio
    for weights in (None, torch.rand(mask.shape, generator=generator)):
        config = verl_on_cpu.actor_config(
            9, clip_ratio=0.3, clip_ratio_low=None if kind == "ppo" else 0.1, clip_ratio_high=0.25, clip_ratio_c=1.5
        )
        config.global_batch_info.update(info)
        results = []
        for registry, loss_mode in ((theirs, name), (core_algos, f"qrm_{kind}")):
            leaf = log_prob.clone().requires_grad_()
            loss, metrics = registry.get_policy_loss_fn(loss_mode)(
                old_log_prob=old, log_prob=leaf, advantages=advantages, response_mask=mask != 0, loss_agg_mode=mode,
                config=config, rollout_is_weights=weights,
            )  # fmt: skip
            results.append((loss, torch.autograd.grad(loss, leaf)[0], metrics))
        (want, want_grad, want_metrics), (got, got_grad, got_metrics) = results
        assert_same(got, want)
        assert_same(got_grad, want_grad)
        assert got_metrics == pytest.approx(want_metrics, abs=1e-5) and want_metrics["actor/pg_clipfrac"] > 0


def test_nan_under_the_mask_reaches_no_loss():
    advantages, _, mask, _ = batch()
    nan = torch.where(mask != 0, -0.5, torch.nan)
    config = verl_on_cpu.actor_config(9)
    for name in LOSSES:
        leaf = nan.clone().requires_grad_()
        given = dict(old_log_prob=nan, log_prob=leaf, advantages=advantages / (mask != 0), response_mask=mask)
        loss, metrics = core_algos.get_policy_loss_fn(name)(**given, config=config)
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all() and all(map(np.isfinite, metrics.values()))


def test_several_ranks_need_the_count_of_all():
    advantages, _, mask, _ = batch()
    config = verl_on_cpu.actor_config(9)
    config.global_batch_info["dp_size"] = 2
    for mode, name in ("token-mean", "batch_num_tokens"), ("seq-mean-token-mean", "global_batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be given for '{mode}' where dp_size is 2"):
            core_algos.get_policy_loss_fn("qrm_ppo")(advantages, advantages, advantages, mask, mode, config)


@pytest.mark.parametrize("shape", [(2, 11), (13,)])
def test_fused_head_is_verls(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(97, 16, generator=generator)
    hidden = torch.randn(*shape, 16, generator=generator)
    labels = torch.randint(97, shape, generator=generator)
    upstream = torch.randn(2, *shape, generator=generator)

    def run(head):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        results = head(*leaves, labels)
        return *results, *torch.autograd.grad(
            results, leaves, [u.view(r.shape) for u, r in zip(upstream, results, strict=True)]
        )

    want = run(lambda h, w, y: verl_on_cpu.untouched(torch_functional).FusedLinearForPPO()(h, w, y, temperature=0.7))
    assert torch_functional.FusedLinearForPPO.forward.__module__ == "qrm_fast.integrations.verl.head"
    got = run(lambda h, w, y: torch_functional.FusedLinearForPPO()(h, w, y, temperature=0.7))
    for x, y in zip(got, want, strict=True):
        assert_same(x, y)
    kernel = run(lambda h, w, y: linear_cross_entropy_module.linear_cross_entropy(h, w, y, 0.7, "none"))
    for x, y in zip(kernel, want, strict=True):
        assert_same(x, y.view(x.shape))


def test_what_the_head_does_not_do_stays_verls(monkeypatch):
    """A sum over tokens, a head split over ranks: verl's Triton kernel, which there is none for on a CPU."""
    hidden, weight, labels = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 2])
    for options in (("sum", None), ("none", "ranks")):
        with pytest.raises((RuntimeError, AssertionError, AttributeError)):
            linear_cross_entropy_module.linear_cross_entropy(hidden, weight, labels, 1.0, *options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return verl_on_cpu.write_model(tmp_path_factory.mktemp("policy"), vocab=512, dim=64, layers=2)


@pytest.fixture
def vendor(monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "qrm_fast")


PROMPTS, RESPONSES = [5, 9, 3], [7, 1, 12]


def update(engine, fused, loss_mode):
    """Loss, gradients, metrics and log-probabilities of one mini-batch; then a step of the optimiser."""
    from verl.workers.config import PolicyLossConfig

    data = verl_on_cpu.mini_batch(PROMPTS, RESPONSES, 512, fused=fused)
    config = verl_on_cpu.actor_config(3, policy_loss=PolicyLossConfig(loss_mode=loss_mode))
    with engine.train_mode():
        engine.optimizer_zero_grad()
        out = engine.forward_backward_batch(data.clone(), partial(ppo_loss, config=config))
        grads = [p.grad.full_tensor().clone() for p in engine.module.parameters()]
        norm = engine.optimizer_step()
    metrics = {name: metric.aggregate() for name, metric in out["metrics"].items()}
    return out["loss"][0], grads, metrics, norm


@pytest.fixture(scope="module")
def stock(model):
    """Of verl as it comes: logits, its own loss."""
    return update(verl_on_cpu.engine(model, fused=None), False, "vanilla")


def assert_same_update(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for x, y in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert got[2] == pytest.approx(want[2], rel=1e-5, abs=1e-5)
    assert got[3] == pytest.approx(want[3], rel=1e-5) and got[3] > 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_update_of_verls_engine_with_our_head_and_loss(model, stock, backend):
    assert_same_update(update(verl_on_cpu.engine(model, fused=backend), True, "qrm_ppo"), stock)


def test_response_rows_alone_reach_the_head(model, stock, vendor, monkeypatch):
    from qrm_fast.integrations.verl import head

    engine = verl_on_cpu.engine(model, fused="torch")
    assert type(engine).__name__ == "ResponseRowsEngine"
    rows = []
    linear_logprobs = head.linear_logprobs
    monkeypatch.setattr(
        head, "linear_logprobs", lambda h, *args, **options: rows.append(len(h)) or linear_logprobs(h, *args, **options)
    )
    assert_same_update(update(engine, True, "qrm_ppo"), stock)
    assert rows == [sum(RESPONSES)]


def test_the_engine_refuses_what_it_cannot_serve(model, vendor):
    for options, name in (
        (dict(fused=None), "model.use_fused_kernels to be True, got False"),
        (dict(fused="liger"), "impl_backend to be torch or triton, got liger"),
        (dict(fused="torch", use_remove_padding=False), "model.use_remove_padding to be True, got False"),
    ):
        with pytest.raises(ValueError, match=name):
            verl_on_cpu.engine(model, **options)


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    """A Q-RM and a PRM with random weights, of the embedded task's vocabulary."""
    torch.manual_seed(0)
    tokenizer, folders = arithmetic_tokenizer(), {}
    for name, num_labels in ("q_rm", 1), ("prm", 2):
        folders[name] = tmp_path_factory.mktemp(name)
        model = load_token_model("scratch:demo", tokenizer, num_labels=num_labels)
        if name == "prm":
            model.config.step_separator = "\n\n"
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


ANSWERS = [
    ("7+6:", "07+6=13\n\n#13<eos>"),
    ("1+2+3:", "#9"),
    ("4:", "4\n\n"),
    ("5:", "<eos>"),
    ("6+1:", "06+1=07\n\n<eos>"),
]


def answers():
    """As verl hands them to a reward manager: prompts padded left, responses right."""
    tokenizer = arithmetic_tokenizer()
    ids = [[tokenizer.encode(text) for text in pair] for pair in ANSWERS]
    widths = [max(len(pair[i]) for pair in ids) for i in (0, 1)]
    prompts = torch.tensor([[0] * (widths[0] - len(p)) + p for p, _ in ids])
    responses = torch.tensor([r + [0] * (widths[1] - len(r)) for _, r in ids])
    mask = torch.tensor(
        [[0] * (widths[0] - len(p)) + [1] * (len(p) + len(r)) + [0] * (widths[1] - len(r)) for p, r in ids]
    )
    rows = dict(data_source=["x"] * len(ids), reward_model=[{"ground_truth": str(i)} for i in range(len(ids))])
    return ids, DataProto.from_dict(
        {"prompts": prompts, "responses": responses, "attention_mask": mask},
        non_tensors={name: np.array(values, dtype=object) for name, values in rows.items()},
    )


def scored(options, compute_score=None):
    """The manager's scores [B, T] of `answers`, which wait together, and how many were scored at once."""
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    ids, data = answers()
    sizes = []

    async def score_all():
        cls = get_reward_manager_cls("qrm_token")
        config = OmegaConf.create({"reward": {"reward_kwargs": options}})
        manager = cls(config, arithmetic_tokenizer(), compute_score, reward_router_address=None)
        score = manager.score
        manager.score = lambda prompts, responses: sizes.append(len(prompts)) or score(prompts, responses)
        rows = await asyncio.gather(*(manager.run_single(data[i : i + 1]) for i in range(len(data))))
        return cls.assemble_rm_scores(data, [row["reward_score"] for row in rows])

    return ids, asyncio.run(score_all()), sizes


def test_a_q_rm_scores_every_token(reward_models):
    ids, got, sizes = scored({"q_rm": str(reward_models["q_rm"]), "max_tokens": 30})
    assert sizes == [len(ANSWERS)]
    tokenizer = arithmetic_tokenizer()
    model = load_token_model(str(reward_models["q_rm"]), tokenizer).eval()
    model.set_attn_implementation("sdpa")
    for row, (prompt, response) in zip(got, ids, strict=True):
        want = model(torch.tensor([prompt + response])).logits[0, len(prompt) :, 0]
        torch.testing.assert_close(row[: len(response)], want.detach(), rtol=1e-4, atol=1e-5)
        assert not row[len(response) :].any()


@pytest.mark.parametrize("verifier", [False, True])
def test_a_prm_scores_the_ends_of_steps(reward_models, verifier):
    options = {"prm": str(reward_models["prm"]), "verifier": verifier}
    ids, got, _ = scored(options, lambda ground_truth, **_: float(int(ground_truth) % 2))
    model = load_token_model(str(reward_models["prm"]), arithmetic_tokenizer(), num_labels=2).eval()
    model.set_attn_implementation("sdpa")
    step = 16  # the blank line
    for i, (prompt, response) in enumerate(ids):
        ends = sorted({t for t, token in enumerate(response) if token == step} | {len(response) - 1})
        read = list(response)
        for t in ends:
            read[t] = step
        logits = model(torch.tensor([prompt + read])).logits[0, len(prompt) :]
        rewards = (logits[:, 1] - logits[:, 0]).div(2).tanh().detach()
        want = torch.zeros(got.shape[1])
        want[ends] = rewards[ends]
        if verifier:  # the last token is the verifier's, the last step moves to the one before unless a step is there
            last = len(response) - 1
            if last > 0 and last - 1 not in ends:
                want[last - 1] = rewards[last]
            want[last] = float(i % 2)
        torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-5)


def test_the_manager_refuses_in_sentences(reward_models):
    q_rm, prm = str(reward_models["q_rm"]), str(reward_models["prm"])
    for options, error in (
        ({}, "must name a q_rm or a prm .* got nothing"),
        ({"q_rm": q_rm, "prm": prm}, "must name a q_rm or a prm"),
        ({"q_rm": q_rm, "modle": 1}, "got q_rm, modle"),
        ({"q_rm": q_rm, "verifier": True}, "verifier belongs to a prm"),
        ({"q_rm": prm}, "must be a Q-RM"),
    ):
        with pytest.raises(ValueError, match=error):
            scored(options)


def test_an_error_while_scoring_reaches_every_answer(reward_models):
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    _, data = answers()

    async def score_all():
        config = OmegaConf.create({"reward": {"reward_kwargs": {"q_rm": str(reward_models["q_rm"])}}})
        manager = get_reward_manager_cls("qrm_token")(config, arithmetic_tokenizer(), None)

        def broken(prompts, responses):
            raise RuntimeError("no memory left")

        manager.score = broken
        runs = (manager.run_single(data[i : i + 1]) for i in range(len(data)))
        return await asyncio.wait_for(asyncio.gather(*runs, return_exceptions=True), timeout=60)

    assert [str(error) for error in asyncio.run(score_all())] == ["no memory left"] * len(ANSWERS)


def test_an_answer_of_the_agent_loop_carries_a_score_per_token():
    answer = agent_loop.AgentLoopOutput(
        prompt_ids=[1], response_ids=[5, 6, 7], response_mask=[1, 0, 1], metrics=agent_loop.AgentLoopMetrics()
    )
    answer.reward_score = 0.5
    torch.testing.assert_close(answer.as_dict()["rm_scores"], torch.tensor([0.0, 0.0, 0.5]))
    answer.reward_score = [0.1, 0.2, 0.3]
    fields = answer.as_dict()
    torch.testing.assert_close(fields["rm_scores"], torch.tensor([0.1, 0.2, 0.3]))
    assert "reward_score" not in fields and answer.reward_score == [0.1, 0.2, 0.3]
    answer.reward_score = [0.1]
    with pytest.raises(ValueError, match="a score per token, 3, got 1"):
        answer.as_dict()


def test_the_recipe_resolves_to_a_configuration_of_verls():
    from hydra import compose, initialize_config_module
    from verl.experimental.reward_loop.reward_loop import migrate_legacy_reward_impl
    from verl.trainer.ppo.reward import resolve_reward_manager_cls
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    text = (ROOT / "docs/integrations.md").read_text()
    command = re.search(r"<!-- recipe: verl -->\n```\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    *runs, _ = words = shlex.split(command)
    assert runs[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = migrate_legacy_reward_impl(compose("ppo_trainer", overrides=words[3:]))
    with pytest.warns(UserWarning, match="Disabled critic"):
        validate_config(config, need_reference_policy(config), need_critic(config))
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode) is LOSSES["qrm_ppo"]
    assert resolve_reward_manager_cls(config).__name__ == "TokenRewardManager"
    rewards = torch.tensor([[0.0, 0.4, 1.0], [0.3, 0.0, 0.0]])
    advantages, _ = core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator)(
        rewards, torch.ones(2, 3), config=config.algorithm, index=np.array(["p", "p"], dtype=object)
    )
    assert advantages.isfinite().all() and advantages.any()
