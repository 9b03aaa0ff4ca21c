"""Adapters in place of weights: what is trained and kept, folders that plain peft reads, references, bad input."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from qrm_fast import pack
from qrm_fast.cli import main
from qrm_fast.rl.arithmetic import arithmetic_demonstration, arithmetic_examples
from qrm_fast.rl.checkpoint import newest_state, save_checkpoint, states
from qrm_fast.rl.config import Config, preset
from qrm_fast.rl.data import STEP, Pair, Solution, write_jsonl
from qrm_fast.rl.implicit_training import DPOConfig, train_implicit
from qrm_fast.rl.linear import use_onednn
from qrm_fast.rl.lora import Start, adapted
from qrm_fast.rl.merge import merge
from qrm_fast.rl.models import load_implicit, load_policy, load_prm, load_q_rm, load_token_model, load_vocabulary_q
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.prm_training import PRMConfig, train_prm
from qrm_fast.rl.reward_training import QRMConfig, train_q_rm
from qrm_fast.rl.scorer import TokenScorer
from qrm_fast.rl.tokenizers import load_tokenizer
from qrm_fast.rl.train import train

peft = pytest.importorskip("peft")

TOKENIZER = load_tokenizer("arithmetic")
ROW = torch.tensor([[3, 4, 5, 6, 7, 1]])
LORA = dict(lora_rank=4, lora_alpha=8.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A fresh policy, a fresh Q-RM, prompts, pairs and solutions."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    save_checkpoint(load_policy("scratch:demo", TOKENIZER), TOKENIZER, folder / "policy")
    save_checkpoint(load_token_model("scratch:demo", TOKENIZER), TOKENIZER, folder / "q_rm")
    examples = arithmetic_examples(16, split="train", seed=0)
    write_jsonl(folder / "prompts.jsonl", examples)
    right = {e.instruction: arithmetic_demonstration(e.instruction) for e in examples}
    write_jsonl(folder / "pairs.jsonl", [Pair(prompt, answer, answer + "0") for prompt, answer in right.items()])
    steps = [(prompt, answer.split(STEP)) for prompt, answer in right.items()]
    solutions = [Solution(p, (*s[:-1], "0"), (*[True] * (len(s) - 1), False)) for p, s in steps]
    write_jsonl(folder / "solutions.jsonl", solutions)
    return folder


@pytest.fixture
def config(inputs, tmp_path):
    return Config(
        model=str(inputs / "policy"),
        q_rm=str(inputs / "q_rm"),
        data=str(inputs / "prompts.jsonl"),
        out=str(tmp_path / "run"),
        overwrite=True,
        num_iterations=2,
        num_prompts=4,
        group_size=4,
        max_new_tokens=8,
        lr=1e-3,
        **LORA,
    )


def reward_options(inputs, out, data="pairs.jsonl"):
    options = dict(model=str(inputs / "policy"), data=str(inputs / data), out=str(out), num_epochs=2)
    return dict(**options, batch_size=8, lr=1e-3, **LORA)


def adapter_of(directory):
    return load_file(Path(directory, "adapter_model.safetensors"))


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@torch.no_grad()
def logits(model):
    return model.eval()(ROW, use_cache=False).logits


def kept_parts(monkeypatch):
    """The parts of every run of `train` from now on."""
    kept = []
    module = __import__("qrm_fast.rl.train", fromlist=["load_parts"])
    load_parts = module.load_parts
    monkeypatch.setattr(module, "load_parts", lambda *args: kept.append(load_parts(*args)) or kept[-1])
    return kept


def test_a_run_trains_the_adapter_alone_and_plain_peft_loads_it(config, monkeypatch):
    kept = kept_parts(monkeypatch)
    config = replace(config, **preset("qrm-released", "ppo"), save_every=1)
    result = train(config)
    [parts] = kept
    base = load_policy(config.model, TOKENIZER)
    frozen = {n.replace(".base_layer", ""): p for n, p in parts.policy.model.get_base_model().named_parameters()}
    assert all(torch.equal(p, frozen[name]) for name, p in base.named_parameters())
    trained = {name for name, p in parts.policy.named_parameters() if p.requires_grad}
    assert len(trained) == len(parts.optimizer.parameters) == 2 * 7 * 3 and all("lora_" in name for name in trained)
    assert not list(Path(config.out).glob("model*.safetensors*")) and not Path(config.out, "config.json").exists()

    saved = json.loads(Path(config.out, "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["r"], saved["lora_alpha"]) == (config.model, 4, 8.0)
    adapter = adapter_of(config.out)
    assert len(adapter) == 42 and all(x.abs().max() > 0 for x in adapter.values())  # B started as 0
    plain = AutoModelForCausalLM.from_pretrained(config.model)
    use_onednn(plain)
    plain = peft.PeftModel.from_pretrained(plain, config.out)
    parts.policy.model.set_attn_implementation("sdpa")
    assert torch.equal(logits(plain), logits(parts.policy.model))
    assert (logits(plain) - logits(AutoModelForCausalLM.from_pretrained(config.model))).abs().max() > 1e-3

    path, _ = newest_state(Path(config.out))
    state = FileSystemReader(path).read_metadata().state_dict_metadata
    in_state = [x.size.numel() for name, x in state.items() if name.startswith("optimizer.masters.")]
    assert sorted(in_state) == sorted(x.numel() for x in adapter.values())
    assert not any(name.startswith(("policy", "critic.")) for name in state)
    assert result.metrics[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_gives_the_same_bits(config, tmp_path, dtype):
    config = replace(config, **preset("qrm-released", "ppo"), num_minibatches=2, dtype=dtype, save_every=1)
    train(config)
    other = replace(config, out=str(tmp_path / "other"))
    train(replace(other, num_iterations=1))
    assert not same_bits(adapter_of(other.out), adapter_of(config.out))
    train(replace(other, resume=True, overwrite=False))
    assert same_bits(adapter_of(other.out), adapter_of(config.out))


def test_the_reference_is_the_base_and_no_copy_of_it(config, monkeypatch):
    """In the loss the KL would be 0 were the reference the policy itself."""
    kept = kept_parts(monkeypatch)
    options = preset("grpo") | dict(reward="random", kl_coef=0.1)
    rows = train(replace(config, **options, num_minibatches=2, lr=1e-2)).metrics
    [parts] = kept
    assert isinstance(parts.reference, Start) and parts.reference.policy is parts.policy
    batch = pack([[3, 4, 5, 1], [6, 7, 8, 9, 1]], [2, 1])
    with torch.no_grad():
        want = Policy(load_policy(config.model, TOKENIZER), num_ids=parts.policy.num_ids)(batch).logprobs
        assert torch.equal(parts.reference(batch).logprobs, want)
        assert (parts.policy(batch).logprobs - want).abs().max() > 1e-3
    assert rows[0]["policy/ref_kl"] < rows[1]["policy/ref_kl"]
    assert all(p.requires_grad for p in parts.optimizer.parameters)


def test_a_folder_with_an_adapter_is_its_merged_model(config, tmp_path, capsys):
    train(config)
    merged = str(tmp_path / "merged")
    assert main(["merge", "--model", config.out, "--out", merged]) == 0
    want = load_policy(config.out, TOKENIZER).state_dict()
    assert same_bits(AutoModelForCausalLM.from_pretrained(merged).state_dict(), want)
    assert not same_bits(load_policy(config.model, TOKENIZER).state_dict(), want)
    once = replace(config, lora_rank=0, num_iterations=1)
    of_adapter, of_merged = (train(replace(once, model=x, out=f"{x}2")) for x in (config.out, merged))
    results = (AutoModelForCausalLM.from_pretrained(x.directory).state_dict() for x in (of_adapter, of_merged))
    assert same_bits(*results)
    backbones = (load_token_model(spec, TOKENIZER).model.state_dict() for spec in (config.out, merged))
    assert same_bits(*backbones)  # where a Q-RM or a critic starts
    assert main(["merge", "--model", config.out, "--out", merged]) == 2
    assert "out must be a new or an empty directory, got " in capsys.readouterr().err
    assert main(["merge", "--model", merged, "--out", str(tmp_path / "m")]) == 2
    assert "must be an adapter, got a model that has none to merge" in capsys.readouterr().err


def test_a_q_rm_is_an_adapter_and_a_whole_head(inputs, config, tmp_path, capsys):
    arguments = ["--lora_rank", 4, "--lora_target_modules", "q_proj,mlp.down_proj", "--lr", 1e-3, "--save_every", 1]
    out, pairs = str(tmp_path / "q_rm"), inputs / "pairs.jsonl"
    arguments = ["train-rm", "--model", inputs / "policy", "--data", pairs, "--out", out, *arguments]
    assert main(list(map(str, arguments))) == 0
    assert capsys.readouterr().err == ""
    adapter = adapter_of(out)
    assert {name.split(".")[-3] for name in adapter if "lora" in name} == {"q_proj", "down_proj"}
    assert adapter["base_model.model.score.weight"].shape == (1, 128)
    q_rm = load_q_rm(out, TOKENIZER)
    base = load_policy(str(inputs / "policy"), TOKENIZER)
    assert torch.equal(q_rm.score.weight, adapter["base_model.model.score.weight"])
    assert torch.equal(q_rm.model.layers[0].self_attn.k_proj.weight, base.model.layers[0].self_attn.k_proj.weight)
    assert not torch.equal(q_rm.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)
    whole_config = AutoConfig.from_pretrained(Path(out, "model_config.json"))
    plain = AutoModelForTokenClassification.from_pretrained(inputs / "policy", config=whole_config)
    q_rm.set_attn_implementation("sdpa")
    # an adapter beside its weights and one inside them differ by rounding
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(plain, out)), logits(q_rm), rtol=1e-5, atol=1e-5)
    merge(out, str(tmp_path / "whole"))
    assert same_bits(load_q_rm(str(tmp_path / "whole"), TOKENIZER).state_dict(), q_rm.state_dict())

    capsys.readouterr()
    printed = []
    for spec in (out, str(tmp_path / "whole")):
        assert main(["score", "--model", spec, "--prompt", "1+1:", "--response", "01+1=02"]) == 0
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1] and printed[0].err == ""
    train(replace(config, q_rm=out, num_iterations=1, **preset("qrm-released", "ppo")))


def test_reward_training_resumes_to_the_same_bits(inputs, tmp_path):
    options = QRMConfig(**reward_options(inputs, tmp_path / "whole"), save_every=1)
    train_q_rm(options)
    newest, _ = states(tmp_path / "whole")
    want = adapter_of(options.out)
    shutil.rmtree(newest)
    train_q_rm(replace(options, resume=True))
    assert same_bits(adapter_of(options.out), want)


def test_the_other_reward_models_keep_what_they_are(inputs, tmp_path):
    prm = PRMConfig(**reward_options(inputs, tmp_path / "prm", "solutions.jsonl"), num_head_epochs=1, separator=STEP)
    train_prm(prm)
    model, adapter = load_prm(prm.out, TOKENIZER), adapter_of(prm.out)
    assert model.config.step_separator == STEP and model.score.weight.shape == (2, 128)
    assert {name for name in adapter if "lora" not in name} == {
        f"base_model.model.score.{x}" for x in ("weight", "bias")
    }
    assert all(x.abs().max() > 0 for x in adapter.values())
    vocabulary = QRMConfig(**reward_options(inputs, tmp_path / "vocabulary"), kind="qrm-vocab")
    train_q_rm(vocabulary)
    assert load_vocabulary_q(vocabulary.out, TOKENIZER).config.reward_model == "qrm-vocab"
    dpo = DPOConfig(**reward_options(inputs, tmp_path / "dpo"), beta=0.3)
    train_implicit(dpo)
    model, reference, beta = load_implicit(dpo.out, TOKENIZER)
    assert beta == 0.3 and same_bits(reference.state_dict(), load_policy(dpo.model, TOKENIZER).state_dict())
    assert not same_bits(model.state_dict(), reference.state_dict())


def test_a_head_is_trained_while_the_adapters_rest(inputs, tmp_path):
    options = reward_options(inputs, tmp_path / "prm", "solutions.jsonl") | dict(num_epochs=0)
    train_prm(PRMConfig(**options, num_head_epochs=1, separator=STEP))
    adapter = adapter_of(options["out"])
    assert all(x.abs().max() == 0 for name, x in adapter.items() if "lora_B" in name)


def test_a_folder_is_of_one_kind(config):
    train(config)
    train(replace(config, lora_rank=0))
    assert not list(Path(config.out).glob("adapter_*")) and not Path(config.out, "model_config.json").exists()
    AutoModelForCausalLM.from_pretrained(config.out)
    train(config)
    assert not list(Path(config.out).glob("model*.safetensors*")) and not Path(config.out, "config.json").exists()
    load_policy(config.out, TOKENIZER)


def test_a_scorer_reads_the_head_that_is_trained(inputs, config):
    scorer = TokenScorer(adapted(load_token_model(config.model, TOKENIZER), config.model, config), reads_action=True)
    scorer(pack([[3, 4, 5, 1]], [2])).sum().backward()
    names = {name for name, p in scorer.named_parameters() if p.grad is not None}
    assert "model.base_model.model.score.modules_to_save.default.weight" in names
    assert all("lora_" in name or "modules_to_save" in name for name in names)


def test_bad_input(config, inputs, tmp_path, capsys, monkeypatch):
    for value in (-1, -8):
        with pytest.raises(ValueError, match=f"lora_rank must be at least 0, got {value}"):
            train(replace(config, lora_rank=value))
    with pytest.raises(ValueError, match=r"lora_alpha must be above 0, got 0"):
        train(replace(config, lora_alpha=0.0))
    linear = "down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj, the linear layers of LlamaForCausalLM"
    for targets in ("q_proj,quux", "lm_head", "embed_tokens", "proj", ""):
        said = f"lora_target_modules must be all-linear or some of {linear}, got {targets.rpartition(',')[2]}$"
        with pytest.raises(ValueError, match=said):
            train(replace(config, lora_target_modules=targets))
    with pytest.raises(
        ValueError, match="lora_rank needs a checkpoint, which the adapter names as its base, got scratch"
    ):
        train_q_rm(
            QRMConfig(**reward_options(inputs, tmp_path / "q") | dict(model="scratch:demo"), tokenizer="arithmetic")
        )
    adapter = str(tmp_path / "adapter")
    train(replace(config, num_iterations=1, out=adapter))
    with pytest.raises(ValueError, match=r"lora_rank needs a whole checkpoint, got the adapter .*: merge it first"):
        train(replace(config, model=adapter))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match=r"needs the package peft, pip install 'qrm_fast\[lora\]'"):
            train(config)
    file = Path(adapter, "adapter_model.safetensors")
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file)
    with pytest.raises(
        ValueError, match=r"must hold every weight it names, got a part: .*layers\.0\.mlp\.down_proj\.lora_A"
    ):
        load_policy(adapter, TOKENIZER)
    assert (
        main(["train", "--model", config.model, "--data", config.data, "--q_rm", config.q_rm, "--lora_rank", "x"]) == 2
    )
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "q").exists()
