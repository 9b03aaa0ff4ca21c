"""The cost model: sizes as published, work as the loop packs and samples it, seconds by hand, and measured steps."""

import json
import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from bench.predicted import compared
from bench.provenance import ROOT
from qrm_fast import pack
from qrm_fast.rl import cost_model
from qrm_fast.rl.cost_model import Ceilings, Devices, Scenario, costs, measured, of_sheet, plan, shape_of, work_of

ROUND = Ceilings(
    products=1e12,
    head=5e11,
    attention=1e11,
    copy=1e11,
    thin=5e10,
    sample=2e10,
    call=1e-6,
    memory=64e9,
    link=1e10,
    network=1e9,
    queued=False,
    source="made up",
)
GPUS = Scenario(model_shape="1.5b", gpus=8)


@pytest.mark.parametrize(
    ("name", "parameters", "adapters"),
    [
        ("0.5b", 494_032_768, 4_399_104 // 8),
        ("1.5b", 1_543_714_304, 9_232_384 // 8),
        ("7b", 7_615_616_512, 20_185_088 // 8),
        ("70b", 70_553_706_496, 103_546_880 // 8),
    ],
)
def test_sizes_are_those_of_the_published_models(name, parameters, adapters):
    """And of adapters of rank 1; those of rank 8 are as peft counts them."""
    shape = shape_of(name)
    assert shape.parameters == shape.trained == parameters
    # embeddings, norms and biases are no matrices
    assert 0 <= 6 * shape.parameters - shape.flops.per_token - shape.flops.per_action < 6.1 * shape.head
    adapted = shape_of(name, lora_rank=8)
    assert adapted.trained == 8 * adapters and adapted.parameters == parameters
    assert adapted.flops.per_token == shape.flops.per_token * 4 / 6 + 6 * adapted.trained


def test_work_is_what_the_loop_packs_and_samples(monkeypatch):
    monkeypatch.setattr(cost_model, "ROWS", 3)
    draw = Random(0)
    group, prompt = 4, 7
    lengths = [draw.randint(1, 9) for _ in range(2 * group)]
    work = work_of(prompt, lengths, group)
    sequences = [[s // group] * prompt + [9] * n for s, n in enumerate(lengths)]
    batch = pack(sequences, [prompt] * len(lengths), share_prompts=True)
    assert (work.num_rows, work.num_actions) == (len(batch.input_ids), len(batch.action_index))
    assert work.num_tokens == sum(map(len, sequences)) and work.num_prompt_tokens == 2 * prompt
    own = 2 * sum(range(prompt))  # of prompts, their last tokens left out
    assert work.num_pairs == own + sum(prompt + i for n in lengths for i in range(n + 1))
    # the engine, a step at a time: an answer ends, the next one takes its row
    waiting, rows, active, context = list(lengths), [], [], []
    while waiting or rows:
        rows += [[prompt, n] for n in waiting[: 3 - len(rows)]]
        del waiting[: sum(seen == prompt for seen, _ in rows)]
        active.append(len(rows))
        context.append(sum(seen for seen, _ in rows))
        rows = [[seen + 1, left - 1] for seen, left in rows if left > 1]
    assert work.active.tolist() == active and work.context.tolist() == context
    assert work.most_context == prompt + max(lengths)


def test_seconds_by_hand():
    shape, work = shape_of("0.5b"), work_of(10, [4, 4], 2)
    result = costs(shape, work, ROUND, torch.float32, scorers=1, reference=True)
    update, score, rollout = (result.phases[name].parts for name in ("update", "score", "rollout"))
    rows, actions = 9 + 2 * 5, 8
    assert work.num_rows == rows and work.num_actions == actions
    assert update["products"] == pytest.approx(6 * shape.matrices * rows / 1e12)
    assert update["head"] == pytest.approx(6 * 896 * 151936 * actions / 5e11)
    assert update["attention"] == pytest.approx(12 * 24 * 896 * work.num_pairs / 1e11)
    values = 24 * (83 * 896 + 27 * 896 + 16 * 256 + 14 * 4864)
    assert update["element-wise"] == pytest.approx(4 * values * rows / 1e11)
    assert update["optimiser"] == pytest.approx(12 * 4 * shape.parameters / 1e11)
    # two models read the answers, one of them has a head
    assert score["products"] == pytest.approx(2 * update["products"] / 3)
    assert score["head"] == pytest.approx(update["head"] / 3)
    # four steps of two rows, which read the weights; to compute with the cache takes longer than to read it
    assert rollout["products"] == pytest.approx(4 * 4 * shape.matrices / 5e10 + 2 * 10 * shape.matrices / 1e12)
    assert rollout["head"] == pytest.approx(4 * 4 * shape.head / 2e10)
    assert rollout["attention"] == pytest.approx(24 * 4 * 896 * 2 * (10 + 11 + 12 + 13) / 1e11)
    assert rollout["element-wise"] == pytest.approx(4 * values / 3 * 8 / 1e11)
    assert rollout["calls"] == pytest.approx(4 * 24 * 100 * 1e-6)
    assert result.step.seconds == pytest.approx(sum(phase.seconds for phase in result.phases.values()))
    assert result.kernels == pytest.approx((rollout["head"] + score["head"] + update["head"]) / result.step.seconds)
    assert update["sharding"] == score["sharding"] == rollout["sharding"] == 0


def test_a_queue_hides_calls_or_work():
    shape, work = shape_of("0.5b"), work_of(10, [4, 4], 2)
    apart, queued = (
        costs(shape, work, ROUND._replace(queued=x, call=1e-4), torch.float32).phases["rollout"] for x in (False, True)
    )
    hidden = sum(apart.parts[name] for name in ("products", "head", "attention", "element-wise"))
    hidden -= 2 * 10 * shape.matrices / 1e12  # prompts are read before
    assert apart.seconds - queued.seconds == pytest.approx(hidden)


def test_sharding_takes_the_slower_of_links_and_network():
    volume = 8e9
    assert Devices(8, 1).gather(volume, ROUND) == pytest.approx(7 / 8 * volume / 1e10)
    assert Devices(8, 2).gather(volume, ROUND) == pytest.approx(15 / 16 * volume / 1e10)  # 8 cards are faster
    assert Devices(2, 4).gather(volume, ROUND) == pytest.approx(3 / 4 * volume / (2 * 1e9))
    assert Devices().gather(volume, ROUND) == 0


def test_sharding_waits_for_what_computing_does_not_hide():
    shape, work = shape_of("0.5b"), work_of(10, [400] * 64, 2)
    slow, fast = (
        costs(shape, work, ROUND._replace(link=x, memory=16e9), torch.float32, Devices(8, 1)) for x in (1e8, 1e15)
    )
    update, num_batches = slow.phases["update"], -(-work.num_rows // slow.max_tokens)
    assert num_batches > 1 and fast.phases["update"].parts["sharding"] == 0
    # weights in both directions, gradients once, while it computes
    assert update.seconds == pytest.approx(num_batches * 7 / 8 * 12 * shape.parameters / 1e8)
    assert slow.phases["rollout"].parts["sharding"] == pytest.approx(7 / 8 * 4 * shape.parameters / 1e8)


def test_samplers_of_several_gpus_read_parts_of_the_weights():
    apart, together = plan(GPUS), plan(replace(GPUS, sampler_gpus=8))
    a, b = (x.phases["rollout"].parts for x in (apart, together))
    assert b["products"] < a["products"] and b["head"] < a["head"] and b["sharding"] > a["sharding"]


def test_memory_by_hand():
    shape, work = shape_of("0.5b"), work_of(10, [4, 4], 2)
    memory, devices = costs(shape, work, ROUND, torch.bfloat16, Devices(4, 1), scorers=1).memory, 4
    assert memory["weights"] == memory["scorers and reference"] == 2 * shape.parameters / devices
    assert memory["optimiser and gradients"] == (4 + 4 + 4 + 4) * shape.parameters / devices
    assert memory["weights, gathered"] == 2 * shape.parameters and memory["keys and values"] == 2 * 24 * 256 * 2 * 14
    memory = costs(shape, work, ROUND, torch.bfloat16, scorers=1).memory
    assert memory["weights"] == memory["scorers and reference"] == 2 * shape.parameters
    assert memory["head"] == 4 * (shape.head + 192 * 151936)
    per_layer = 2 * (11 * 896 + 2 * 4864) + 16 * 896
    assert memory["activations"] == (24 * per_layer + 2 * 2 * 896) * work.num_rows
    queued = costs(shape, work, ROUND._replace(queued=True), torch.bfloat16).memory
    assert queued["head"] == 4 * shape.head + 2 * work.num_rows * 151936 and "keys and values" not in queued
    assert "keys and values" in memory  # which malloc keeps
    small = costs(shape, work_of(10, [400] * 64, 2), ROUND._replace(memory=14e9), torch.float32)
    assert small.max_tokens % 256 == 0 and sum(small.memory.values()) <= 0.9 * 14e9


def test_ceilings_that_are_given_scale_what_goes_with_them():
    sheet = of_sheet("h100")
    given = sheet.given(2 * sheet.products, 3 * sheet.copy)
    for name in ("products", "head", "attention"):
        assert getattr(given, name) == pytest.approx(2 * getattr(sheet, name))
    for name in ("copy", "thin", "sample"):
        assert getattr(given, name) == pytest.approx(3 * getattr(sheet, name))
    assert given.call == sheet.call and given.source.startswith("products and copies given, else data sheet of H100")
    assert sheet.given(0, 0) == sheet


def test_this_cpu_is_measured():
    shape = shape_of("0.5b")._replace(hidden=64, gate=128, queries=64, head=64 * 256)
    ceilings = measured(shape, torch.float32)
    rates = [x for x in ceilings if isinstance(x, float) and math.isfinite(x)]
    assert len(rates) == 8 and all(x > 0 for x in rates) and ceilings.call < 1e-3 and not ceilings.queued


def test_a_folder_is_a_shape(tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(str(tmp_path))
    assert (shape.head, shape.cached, shape.gate, shape.layers) == (64_000, 64, 128, 2)
    assert shape.matrices == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(model_shape="9b"), "model_shape must be one of 0.5b, .* got 9b"),
        (dict(gpus=0, nodes=2), "nodes are of gpus, expected 1 on a CPU, got 2"),
        (dict(sampler_gpus=3), "sampler_gpus must divide the gpus of a node, 8, got 3"),
        (dict(max_new_tokens=2000), "max_new_tokens must be from answer_tokens, 512, to twice that, .* got 2000"),
        (dict(num_prompts=4), "num_prompts must be at least 1 per device, 8, got 4"),
        (dict(dtype="float32"), "expected gemm_tflops with dtype float32, got 0"),
        (dict(model_shape="70b", gpus=1), "must leave room to sample .* of 127 GB of a device"),
        (dict(group_size=0), "group_size must be at least 1, got 0"),
    ],
)
def test_what_it_refuses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(replace(GPUS, **options))


def test_lengths_are_spread_around_their_mean(monkeypatch):
    seen = []
    monkeypatch.setattr(
        cost_model, "work_of", lambda prompt, lengths, group: seen.append(lengths) or work_of(prompt, lengths, group)
    )
    plan(replace(GPUS, answer_tokens=500, max_new_tokens=800))
    (lengths,) = seen
    assert (lengths.min(), lengths.max(), len(lengths)) == (200, 800, 128)
    assert np.mean(lengths) == pytest.approx(500, abs=1)


STEPS = [
    pytest.param(record, id=f"{path.stem} {record['case']}")
    for path in sorted((ROOT / "bench/results").glob("*.json"))
    for record in json.loads(path.read_text())["records"]
    if "machine" in record
]


def test_steps_were_measured():
    assert len(STEPS) >= 4


@pytest.mark.parametrize("record", STEPS)
def test_measured_steps_are_within_a_quarter(record):
    for what, seen, said in compared(record):
        assert said == pytest.approx(seen, rel=0.25), f"{what}: {said / seen:.2f} of what was measured"
