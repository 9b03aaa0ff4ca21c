"""TRL in an environment of its own (`make test-trl`): its numbers through our head and packed forward; credit."""

import importlib.metadata
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("trl")

import torch
import trl.trainer.utils
from datasets import Dataset
from packaging.requirements import Requirement
from peft import LoraConfig
from test_dependencies import base_dependencies
from torch.distributed.fsdp import fully_shard
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from qrm_fast import pack, prm_rewards, process_advantages, q_token_rewards
from qrm_fast.integrations.trl import (
    PackedForward,
    ProcessCredit,
    QRMCredit,
    TokenCredit,
    hooks,
    packed_forward,
    token_credit,
    use_linear_logprobs,
)
from qrm_fast.integrations.trl.__main__ import check
from qrm_fast.integrations.trl.head import LinearLogprobsHead
from qrm_fast.integrations.trl.objective import Objective, policy_objective
from qrm_fast.rl.arithmetic import (
    STEP,
    arithmetic_demonstration,
    arithmetic_examples,
    arithmetic_tokenizer,
)
from qrm_fast.rl.attention import packed_hidden
from qrm_fast.rl.data import Demonstration, write_jsonl
from qrm_fast.rl.demo import PAIR_PROMPTS, Q_RM, SFT, sample_pairs
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.reward_training import train_q_rm
from qrm_fast.rl.sft import train_sft

ROOT = Path(__file__).parent.parent.parent
PROMPTS = [str(example.instruction) for example in arithmetic_examples(32, split="train", seed=0)]


class PackedGRPO(PackedForward, GRPOTrainer):
    pass


class PackedRLOO(PackedForward, RLOOTrainer):
    pass


class CreditedGRPO(TokenCredit, PackedForward, GRPOTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic_tokenizer()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """The checkpoint of a policy of random weights."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    load_policy("scratch:demo", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_path():
    """For a test in which TRL's own path is to run."""


@pytest.fixture(autouse=True)
def no_warning_of_ours(request):
    """Where TRL's own path runs it is warned of: any other test fails there."""
    hooks.warned.clear()
    with warnings.catch_warnings():
        if "own_path" not in request.fixturenames:
            warnings.filterwarnings("error", "TRL runs its own")
        yield


def ones(completions, **_):
    return [float(text.count("1")) for text in completions]


def make(kind, model, tokenizer, out, config=None, reward=ones, dataset=None, extra=None, **options):
    defaults = dict(output_dir=str(out), use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1)
    defaults |= dict(per_device_train_batch_size=8, gradient_checkpointing=False, learning_rate=1e-3, max_steps=3)
    defaults |= dict(disable_tqdm=True)
    if config is None:
        config = RLOOConfig if issubclass(kind, RLOOTrainer) else GRPOConfig
    if config in (GRPOConfig, RLOOConfig):
        defaults |= dict(num_generations=4, max_completion_length=24)
        extra = dict(reward_funcs=reward) | (extra or {})
    dataset = Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset
    args = config(**defaults | options)
    return kind(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **extra or {})


def history(trainer, *names):
    trainer.train()
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


def assert_same(got, expected, steps=3):
    assert len(expected) == steps
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-4)


VARIANTS = {
    "plain": {},
    "a reference": dict(beta=0.1),
    "two iterations": dict(num_iterations=2, per_device_train_batch_size=4, gradient_accumulation_steps=2),
    "checkpointed activations": dict(gradient_checkpointing=True),
    "sequence ratios": dict(importance_sampling_level="sequence", loss_type="grpo", mask_truncated_completions=True),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_three_steps_of_grpo_print_what_trl_prints(tiny, tokenizer, tmp_path, options):
    def run(kind):
        return make(kind, tiny, tokenizer, tmp_path, temperature=0.9, **options)

    expected = history(run(GRPOTrainer), "loss", "entropy", "grad_norm")
    with use_linear_logprobs():
        assert_same(history(run(GRPOTrainer), "loss", "entropy", "grad_norm"), expected)
    assert_same(history(run(PackedGRPO), "loss", "entropy", "grad_norm"), expected)


# Every loss of GRPOTrainer's that linear_policy_loss computes, and what it leaves to TRL.
OBJECTIVES = {
    "grpo": (dict(loss_type="grpo"), "ppo"),
    "bnpo": (dict(loss_type="bnpo", beta=0.1, use_bias_correction_kl=False), "ppo"),
    "dr_grpo": (dict(loss_type="dr_grpo", epsilon_high=0.3), "ppo"),
    "dapo": (dict(loss_type="dapo", delta=1.3), "ppo"),
    "luspo": (dict(loss_type="luspo", importance_sampling_level="sequence"), "gspo"),
    "gspo": (dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.02), "gspo"),
    "gspo over the batch": (
        dict(loss_type="dapo", importance_sampling_level="sequence", beta=0.1, use_bias_correction_kl=False),
        "gspo",
    ),
    "cispo": (dict(loss_type="cispo", epsilon_high=1.1), "cispo"),
    "sapo": (dict(loss_type="sapo"), "sapo"),
    "unbiased kl": (dict(loss_type="dapo", beta=0.1, use_bias_correction_kl=True), "ppo"),
}
LEFT_TO_TRL = {
    "entropy mask": (dict(top_entropy_quantile=0.5), "top_entropy_quantile"),
    "off-policy mask": (dict(off_policy_mask_threshold=0.5), "off_policy_mask_threshold"),
    "entropy bonus": (dict(entropy_coef=0.01), "entropy bonus"),
    "vespo": (dict(loss_type="vespo"), "vespo"),
    "cispo below 1": (dict(loss_type="cispo", epsilon_high=0.2), "cispo"),
    "sapo of other temperatures": (dict(loss_type="sapo", sapo_temperature_neg=2.0), "sapo"),
    "delta below the clip": (dict(delta=1.1), "delta 1.1"),
    "cispo of sequences": (
        dict(loss_type="cispo", epsilon_high=2.0, importance_sampling_level="sequence"),
        "the sequence's ratio",
    ),
}


def micro_batch(generator):
    """What TRL hands to its loss after a step: other old and reference log-probabilities, tool output, no answer."""
    ids, mask = padded(generator)
    tool = (torch.rand(6, 11, generator=generator) > 0.2).long()
    old, ref = (torch.randn(6, 11, generator=generator) * 0.2 - 3.0 for _ in range(2))
    return dict(
        prompt_ids=ids[:, :7],
        prompt_mask=mask[:, :7],
        completion_ids=ids[:, 7:],
        completion_mask=mask[:, 7:],
        tool_mask=tool,
        advantages=torch.randn(6, generator=generator),
        num_items_in_batch=(mask[:, 7:] * tool).sum() * 2,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        importance_sampling_ratio=torch.rand(6, 11, generator=generator) + 0.5,
    )


def losses(trainer, inputs):
    """TRL's loss of a micro-batch, its gradient, and what it logs."""
    trainer.current_gradient_accumulation_steps = 3
    trainer.model.train()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, inputs)
    return loss, *torch.autograd.grad(loss, trainer.model.parameters()), dict(trainer._metrics["train"])


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(("options", "kind"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_losses_that_linear_policy_loss_computes(tiny, tokenizer, tmp_path, options, kind, on_policy, monkeypatch):
    inputs = micro_batch(torch.Generator().manual_seed(0))
    stock, packed = (make(x, tiny, tokenizer, tmp_path, **options) for x in (GRPOTrainer, PackedGRPO))
    inputs["old_per_token_logps"] = old = None
    if not on_policy:  # near the policy's, so that some ratios are clipped and some are not
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        old = logps(stock, ids, mask)[0].detach() + 0.2 * torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
        inputs["old_per_token_logps"] = old
    seen = []
    monkeypatch.setattr(packed_forward, "policy_objective", lambda *x: seen.append(policy_objective(*x)) or seen[-1])
    *got, got_metrics = losses(packed, inputs)
    *expected, expected_metrics = losses(stock, inputs)
    assert isinstance(seen[0], Objective) and seen[0].options["kind"] == kind
    assert packed._carried is not None
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert got_metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert got_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_token_advantages_and_weights_of_the_sampler(tiny, tokenizer, tmp_path):
    inputs = micro_batch(torch.Generator().manual_seed(0))
    inputs["advantages"] = torch.randn(6, 11, generator=torch.Generator().manual_seed(2))
    stock, packed = (make(x, tiny, tokenizer, tmp_path) for x in (GRPOTrainer, PackedGRPO))
    stock.use_vllm = packed.use_vllm = True
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"]
    *got, _ = losses(packed, inputs)
    *expected, _ = losses(stock, inputs)
    assert packed._carried is not None
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("own_path")
@pytest.mark.parametrize(("options", "why"), LEFT_TO_TRL.values(), ids=LEFT_TO_TRL)
def test_the_losses_that_are_left_to_trl(tiny, tokenizer, tmp_path, options, why):
    inputs = micro_batch(torch.Generator().manual_seed(0))
    stock, packed = (make(x, tiny, tokenizer, tmp_path, **options) for x in (GRPOTrainer, PackedGRPO))
    with pytest.warns(UserWarning, match=f"its own loss: .*{why}"):
        *got, _ = losses(packed, inputs)
    *expected, _ = losses(stock, inputs)
    assert packed._carried is None
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_three_steps_of_rloo_print_what_trl_prints(tiny, tokenizer, tmp_path):
    expected = history(make(RLOOTrainer, tiny, tokenizer, tmp_path), "entropy", "kl", "grad_norm")
    with use_linear_logprobs():
        assert_same(history(make(RLOOTrainer, tiny, tokenizer, tmp_path), "entropy", "kl", "grad_norm"), expected)
    assert_same(history(make(PackedRLOO, tiny, tokenizer, tmp_path), "entropy", "kl", "grad_norm"), expected)


def test_dpo_and_sft_on_the_shared_head_print_what_trl_prints(tiny, tokenizer, tmp_path):
    slips = Random(0)
    pairs = Dataset.from_dict(
        {
            "prompt": PROMPTS,
            "chosen": [arithmetic_demonstration(p) for p in PROMPTS],
            "rejected": [arithmetic_demonstration(p, slips) for p in PROMPTS],
        }
    )
    whole = Dataset.from_dict({"text": [p + arithmetic_demonstration(p) for p in PROMPTS]})

    def dpo():
        trainer = make(DPOTrainer, tiny, tokenizer, tmp_path, DPOConfig, dataset=pairs, loss_type="sigmoid")
        return history(trainer, "loss", "logits/chosen", "mean_token_accuracy", "entropy")

    def sft():
        trainer = make(SFTTrainer, tiny, tokenizer, tmp_path, SFTConfig, dataset=whole)
        return history(trainer, "loss", "mean_token_accuracy", "entropy")

    for run in (dpo, sft):
        expected = run()
        with use_linear_logprobs():
            assert_same(run(), expected)


def padded(generator, num_answers=6, prompt=7, completion=11, num_ids=17):
    """Prompts padded on the left, completions on the right, one of them empty."""
    prompts = torch.randint(1, prompt + 1, (num_answers,), generator=generator)
    lengths = torch.randint(1, completion + 1, (num_answers,), generator=generator)
    lengths[2] = 0
    mask = torch.cat(
        [torch.arange(prompt) >= prompt - prompts[:, None], torch.arange(completion) < lengths[:, None]], 1
    )
    ids = torch.randint(2, num_ids, mask.shape, generator=generator)
    return ids.where(mask, 0), mask.long()


def logps(trainer, ids, mask, **options):
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 11, compute_entropy=True, **options)


def gradients(trainer, ids, mask, weights):
    logprobs, entropies, _ = logps(trainer, ids, mask, batch_size=4)
    loss = (weights * logprobs - 0.1 * entropies).sum()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return logprobs, entropies, *torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("seed", range(3))
def test_random_padded_rows_and_their_gradients(tiny, tokenizer, tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, mask = padded(generator)
    weights = torch.randn(6, 11, generator=generator)
    stock, packed = (make(kind, tiny, tokenizer, tmp_path, temperature=0.7) for kind in (GRPOTrainer, PackedGRPO))
    for got, expected in zip(gradients(packed, ids, mask, weights), gradients(stock, ids, mask, weights), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not logps(packed, ids, mask)[0][mask[:, 7:] == 0].any()
    assert packed.model.config._attn_implementation == packed_forward.ATTENTION


def test_answers_to_one_prompt_share_its_rows(tiny, tokenizer, tmp_path):
    """Wherever they stand among the rows: TRL shuffles them."""
    generator = torch.Generator().manual_seed(3)
    ids, mask = padded(generator)
    for b in (3, 5):
        ids[b, :7], mask[b, :7] = ids[0, :7], mask[0, :7]
    batch, row, column = packed_forward.pack_answers(ids, mask, 11, share_prompts=True)
    assert len(batch.input_ids) == mask.sum() - 2 * (mask[0, :7].sum() - 1)
    assert torch.equal(ids[:, 7:][row, column], batch.targets[batch.action_index])
    weights = torch.randn(6, 11, generator=generator)
    stock, packed = (make(kind, tiny, tokenizer, tmp_path) for kind in (GRPOTrainer, PackedGRPO))
    assert packed.share_prompts
    for got, expected in zip(gradients(packed, ids, mask, weights), gradients(stock, ids, mask, weights), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_head_under_a_scale_a_softcap_and_a_bias():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(n, generator=generator) for n in ((9, 8), (50, 8), (50,)))
    targets = torch.randint(50, (9,), generator=generator)
    outputs = ("entropy", "is_top1")
    for head in (LinearLogprobsHead, trl.trainer.utils._ChunkedLogProbFunction):
        results = head.apply(hidden, weight, bias, targets, 0.7, 16, 5.0, 0.3, outputs)
        if head is LinearLogprobsHead:
            got = results
    for a, b in zip(got, results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_adapters_and_their_reference(tiny, tokenizer, tmp_path):
    def run(kind):
        lora = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        trainer = make(kind, tiny, tokenizer, tmp_path, beta=0.1, learning_rate=1e-2, extra=dict(peft_config=lora))
        return history(trainer, "loss", "kl", "grad_norm")

    expected = run(GRPOTrainer)
    assert expected[2][1] > 0
    assert_same(run(PackedGRPO), expected)


def test_what_wraps_the_model_sees_the_call(tiny, tokenizer, tmp_path):
    """FSDP2's hooks gather the weights: without them the forward pass would meet sharded ones."""
    ids, mask = padded(torch.Generator().manual_seed(0))
    stock, packed = (make(kind, tiny, tokenizer, tmp_path) for kind in (GRPOTrainer, PackedGRPO))
    expected = logps(stock, ids, mask)[0]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        cpu = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in packed.model.model.layers:
            fully_shard(layer, mesh=cpu)
        fully_shard(packed.model, mesh=cpu)
        got = logps(packed, ids, mask)[0]
        torch.testing.assert_close(got, expected)
        got.sum().backward()
        assert all(p.grad is not None for p in packed.model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("own_path")
def test_what_cannot_be_packed_goes_trls_way_with_one_warning(tiny, tokenizer, tmp_path, monkeypatch):
    ids, mask = padded(torch.Generator().manual_seed(0))
    stock, packed = (make(kind, tiny, tokenizer, tmp_path) for kind in (GRPOTrainer, PackedGRPO))
    hole, unprompted = mask.clone(), mask.clone()
    hole[3, 6] = 0
    unprompted[3, :7] = 0
    for rows in (hole, unprompted):
        hooks.warned.clear()
        with pytest.warns(UserWarning, match="its own padded forward: a row .* is not one run of tokens"):
            got = logps(packed, ids, rows)[0]
        torch.testing.assert_close(got, logps(stock, ids, rows)[0])

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *_, **__: "TRL's own")
    for options, why in (
        (dict(compute_aux_loss=True), "mixture of experts"),
        (dict(token_type_ids=torch.zeros_like(ids), image_sizes=None), "multimodal"),
    ):
        with pytest.warns(UserWarning, match=f"its own padded forward.*{why}") as seen:
            for _ in range(2):
                assert logps(packed, ids, mask, **options) == "TRL's own"
        assert sum("TRL runs its own" in str(w.message) for w in seen) == 1


@pytest.mark.usefixtures("own_path")
def test_a_model_that_leaks_goes_trls_way(tiny, tokenizer, tmp_path, monkeypatch):
    ids, mask = padded(torch.Generator().manual_seed(0))
    expected = logps(make(GRPOTrainer, tiny, tokenizer, tmp_path), ids, mask)[0]

    def leaks(model, num_tokens):
        raise ValueError("Llama must compute packed sequences as it does each alone")

    monkeypatch.setattr(packed_forward, "check_packing", leaks)
    packed = make(PackedGRPO, tiny, tokenizer, tmp_path)
    assert packed.model.config._attn_implementation == "sdpa"
    with pytest.warns(UserWarning, match="as it does each alone"):
        torch.testing.assert_close(logps(packed, ids, mask)[0], expected)


@pytest.mark.usefixtures("own_path")
def test_wpo_asks_for_what_our_head_has_not(tiny):
    hidden, weight = torch.randn(5, 8), torch.randn(20, 8)
    arguments = hidden, weight, None, torch.arange(5), 1.0, 16, None, 1.0, ("log_sum_sq_probs",)
    with pytest.warns(UserWarning, match="its own head.*WPO"):
        got = LinearLogprobsHead.apply(*arguments)
    torch.testing.assert_close(got[2], trl.trainer.utils._ChunkedLogProbFunction.apply(*arguments)[2])


def test_the_head_goes_back(tiny):
    before = trl.trainer.utils._ChunkedLogProbFunction, trl.trainer.utils._use_triton
    with use_linear_logprobs():
        with use_linear_logprobs():  # as by a packed trainer after the plain call
            pass
        assert trl.trainer.utils._ChunkedLogProbFunction is LinearLogprobsHead
    assert (trl.trainer.utils._ChunkedLogProbFunction, trl.trainer.utils._use_triton) == before


@pytest.mark.parametrize("name", hooks.HOOKS)
def test_a_hook_that_has_moved_raises_with_its_name(name, monkeypatch, tiny, tokenizer, tmp_path):
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(hooks.find_hook(owner), attribute, lambda something_else: None)
    if "_get_per_token" in name:
        kind = PackedGRPO
    elif "GRPOTrainer" in name:
        kind = CreditedGRPO
    else:
        kind = None
    with pytest.raises(hooks.Moved, match=name.replace(".", r"\.")):
        use_linear_logprobs() if kind is None else kind(credit=None) if kind is CreditedGRPO else kind()
    assert check() == 1
    monkeypatch.delattr(hooks.find_hook(owner), attribute)
    with pytest.raises(hooks.Moved, match=f"{name.replace('.', '[.]')} of trl .* has (moved|changed)"):
        hooks.find_hook(name)


def test_another_version_of_trl_raises(monkeypatch):
    monkeypatch.setattr("trl.__version__", "1.17.0")
    with pytest.raises(hooks.Moved, match=r"written for trl 1\.16, got 1\.17\.0"):
        use_linear_logprobs()


def test_a_mixin_behind_its_trainer_raises():
    for mixin in (PackedForward, TokenCredit):
        with pytest.raises(TypeError, match=f"{mixin.__name__} must stand before the trainer"):
            type("Trainer", (GRPOTrainer, mixin), {})


def test_check_says_what_is_there():
    command = [sys.executable, "-m", "qrm_fast.integrations.trl", "check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "trl 1.16" in done.stdout and done.stdout.count("found  trl.trainer") == len(hooks.HOOKS)
    assert "head: csrc/cpu/linear_logprobs.cpp on the CPU" in done.stdout


def test_the_examples_of_the_pages_run(monkeypatch):
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs/integrations.md").read_text()
    blocks = re.findall(r"```python.*?\n(.*?)```", pages, flags=re.DOTALL)
    blocks = [block for block in blocks if "integrations.trl import" in block]
    assert len(blocks) == 4
    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        monkeypatch.setattr(trl.trainer.utils, name, getattr(trl.trainer.utils, name))  # put back at the end
    for block in blocks:
        exec(block, names := {})
        assert issubclass(names.get("Trainer", GRPOTrainer), GRPOTrainer)
    assert trl.trainer.utils._ChunkedLogProbFunction is LinearLogprobsHead


def test_installing_this_changes_nothing_that_trl_brought():
    for requirement in base_dependencies():
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement
    wanted = [Requirement(line) for line in importlib.metadata.requires("trl")]
    for requirement in [r for r in wanted if r.marker is None]:
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement


@pytest.fixture(scope="module")
def token_models(tmp_path_factory, tokenizer):
    """Checkpoints of a Q-RM and a process reward model of random weights."""
    folders = {}
    for num_labels in (1, 2):
        torch.manual_seed(num_labels)
        folder = str(tmp_path_factory.mktemp(f"labels{num_labels}"))
        model = load_token_model("scratch:demo", tokenizer, num_labels=num_labels)
        model.config.step_separator = "#"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[num_labels] = folder
    return folders


def generated(trainer):
    """What TRL hands to its loss, of the first two prompts."""
    trainer.model.train()
    inputs = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)]
    return trainer._generate_and_score_completions(inputs)


def as_lists(out):
    prompts = [ids[m.bool()].tolist() for ids, m in zip(out["prompt_ids"], out["prompt_mask"], strict=True)]
    answers = [ids[m.bool()].tolist() for ids, m in zip(out["completion_ids"], out["completion_mask"], strict=True)]
    return pack([p + a for p, a in zip(prompts, answers, strict=True)], [len(p) for p in prompts])


def assert_advantages(out, expected):
    mask = out["completion_mask"].bool()
    assert out["advantages"].shape == mask.shape
    torch.testing.assert_close(out["advantages"][mask], expected, rtol=1e-5, atol=1e-5)
    assert not out["advantages"][~mask].any() and expected.std() > 0


def test_q_rm_credit_mixed_with_the_trainers_own(tiny, tokenizer, tmp_path, token_models):
    credit = QRMCredit(token_models[1], tokenizer, coef=0.5, outcome_coef=2.0, eos_rescore="mean", min_std_share=0.0)
    trainer = make(CreditedGRPO, tiny, tokenizer, tmp_path, extra=dict(credit=credit), per_device_train_batch_size=4)
    out = generated(trainer)
    batch = as_lists(out)
    q = credit.scorer(batch)
    expected = 0.5 * q_token_rewards(q, batch.action_cu_seqlens, center=True, eos_rescore="mean")
    rewards = torch.tensor(ones(tokenizer.batch_decode(out["completion_ids"], skip_special_tokens=True))).view(2, 4)
    own = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert_advantages(out, expected + 2.0 * own.view(-1)[batch.seq_ids])
    assert trainer._metrics["train"]["credit/q_mean"] == [pytest.approx(q.mean().item(), rel=1e-4)]


@pytest.mark.parametrize("preset", ["paper", "openrlhf", "verl"])
def test_process_credit_with_verified_answers(tiny, tokenizer, tmp_path, token_models, preset):
    def right(completions, **_):
        return [None if i == 1 else float(i % 3 == 0) for i in range(len(completions))]

    credit = ProcessCredit(token_models[2], tokenizer, preset=preset, max_gen_len=24)
    out = generated(make(CreditedGRPO, tiny, tokenizer, tmp_path, reward=right, extra=dict(credit=credit)))
    batch = as_lists(out)
    cu = batch.action_cu_seqlens.tolist()
    step, mark = (tokenizer.convert_tokens_to_ids(token) for token in (STEP, "#"))
    actions = batch.targets[batch.action_index].tolist()
    ends = [t for t, token in enumerate(actions) if token == step or t + 1 in cu[1:]]
    assert len(ends) > 8, "the answers must have steps, or this shows nothing"
    rows = batch.action_index[ends] + 1
    model = credit.scorer.model
    hidden = packed_hidden(model, batch._replace(input_ids=batch.input_ids.index_fill(0, rows, mark)))
    expected = process_advantages(
        prm_rewards(model.score(hidden[rows])),
        torch.tensor(ends),
        batch.action_cu_seqlens,
        torch.arange(8) // 4,
        outcome_rewards=torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0]),
        has_answer=torch.arange(8) != 1,
        preset=preset,
        max_gen_len=24,
    )
    assert_advantages(out, expected)


def test_tool_output_and_truncated_answers_earn_nothing(tiny, tokenizer, tmp_path, monkeypatch):
    def count(answers):
        return torch.arange(1.0, int(answers.cu_seqlens[-1]) + 1), {}

    trainer = make(CreditedGRPO, tiny, tokenizer, tmp_path, extra=dict(credit=count))
    before = GRPOTrainer._generate_and_score_completions

    def with_tools(self, inputs):
        out = before(self, inputs)
        out["tool_mask"] = torch.ones_like(out["completion_mask"])
        out["tool_mask"][:, 1:3] = 0
        out["completion_mask"][5] = 0
        return out

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_tools)
    out = generated(trainer)
    mask = (out["completion_mask"] * out["tool_mask"]).bool()
    assert out["advantages"][mask].tolist() == list(range(1, int(mask.sum()) + 1))
    assert not out["advantages"][~mask].any()
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.compute_loss(trainer.model, out).isfinite()


def test_credit_refuses_in_a_sentence(tiny, tokenizer, tmp_path, token_models):
    with pytest.raises(TypeError, match="needs a GRPOTrainer"):
        type("Trainer", (TokenCredit, RLOOTrainer), {})(credit=None)
    with pytest.raises(ValueError, match="a Q-RM, a token classifier with one label"):
        QRMCredit(token_models[2], tokenizer)
    with pytest.raises(ValueError, match="a PRM, a token classifier with two labels"):
        ProcessCredit(token_models[1], tokenizer)
    with pytest.raises(ValueError, match="whole groups of 3 answers, got 8"):
        token_credit._check_groups(8, 3)


@pytest.mark.unpoisoned
def test_grpo_learns_the_embedded_task_from_a_q_rm(tmp_path):
    """The recipe of examples/trl_q_rm.py, with the demo's policy and Q-RM: one of half the pairs is soon outwitted."""
    sys.path.insert(0, str(ROOT / "examples"))
    from trl_q_rm import train

    slips = Random(0)
    rows = arithmetic_examples(SFT.num_steps * SFT.batch_size, split="train", seed=0)
    demonstrations = [Demonstration(e.instruction, arithmetic_demonstration(str(e.instruction), slips)) for e in rows]
    write_jsonl(tmp_path / "demonstrations.jsonl", demonstrations)
    sft = train_sft(replace(SFT, data=f"{tmp_path}/demonstrations.jsonl", out=f"{tmp_path}/sft"))
    pairs, _ = sample_pairs(sft.directory, arithmetic_examples(PAIR_PROMPTS, split="train", seed=2), seed=0)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    q_rm = train_q_rm(replace(Q_RM, data=f"{tmp_path}/pairs.jsonl", out=f"{tmp_path}/q_rm", model=sft.directory))
    write_jsonl(tmp_path / "prompts.jsonl", arithmetic_examples(8192, split="train", seed=1))
    trainer = train(
        sft.directory, q_rm.directory, f"{tmp_path}/prompts.jsonl", f"{tmp_path}/out", "arithmetic", use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1, max_steps=14,
        per_device_train_batch_size=256, num_generations=4, max_completion_length=60, learning_rate=5e-5,
        lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    assert "qrm_packed" not in (tmp_path / "out/config.json").read_text()
    share_right = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"right: {[round(x, 3) for x in share_right]}")
    assert sum(share_right[-4:]) / 4 > sum(share_right[:2]) / 2 + 0.04, share_right
