"""What an iteration of the loop costs on a machine: seconds, tokens per second and memory, before anything is run.

A phase is the work of its parts over what the machine does at most: matrix products, heads and attention by their FLOPs
(flops.py), everything else in a layer by the bytes it moves, steps of sampling by the weights they read and the calls
they make, sharding by the bytes between devices. The counts below are those of transformers' eager layers.
"""

import heapq
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from .. import linear_policy_loss, linear_sample
from .attention import backbone
from .config import CPU_TOKENS
from .flops import UpdateFlops, update_flops
from .gated import keep_less
from .linear import use_onednn
from .policy import Policy
from .ranges import Count, CountOrNone, NonNegative, check_ranges
from .rollout import TransformersEngine
from .run_folder import Dtype

# Values that a layer reads and writes per row outside products and attention, forward and backward pass, as counted in
# its dispatched operations: norms, residuals, rotary embedding, gate. Per value of hidden, queries, keys and gate.
PASSES = {"hidden": 83, "queries": 27, "cached": 16, "gate": 14}
SAVED = {"hidden": 11, "gate": 2}  # values that a layer keeps per row for its backward pass
OPTIMIZER_PASSES = 12  # of AdamW and of clipping, per trained parameter
CALLS_PER_LAYER = 100  # operations of a layer in a step of sampling, views and modules among them
ROWS = 512  # answers that the engine in this process samples at a time
FREE = 0.9  # share of a device's memory that is to be used
LARGE = 1 << 26  # bytes that no cache holds

# Qwen2.5 and, 8b and 70b, Llama 3: hidden size, feed-forward size, layers, heads, heads of keys, ids, tied embeddings.
SHAPES = {
    "0.5b": (Qwen2Config, 896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, True),
    "3b": (Qwen2Config, 2048, 11008, 36, 16, 2, 151936, True),
    "7b": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, False),
    "8b": (LlamaConfig, 4096, 14336, 32, 32, 8, 128256, False),
    "14b": (Qwen2Config, 5120, 13824, 48, 40, 8, 152064, False),
    "32b": (Qwen2Config, 5120, 27648, 64, 40, 8, 152064, False),
    "70b": (LlamaConfig, 8192, 28672, 80, 64, 8, 128256, False),
}


class Ceilings(NamedTuple):
    """What one device does at most."""

    products: float  # FLOP/s of a layer's matrix products, forward and backward pass
    head: float  # FLOP/s of a head's, with its loss
    attention: float  # FLOP/s of a query and a key that it sees
    copy: float  # bytes/s read and written
    thin: float  # bytes/s of weights, or of the cache, in a product of few rows
    sample: float  # bytes/s of a head's weights in a token for few rows
    call: float  # seconds of an operation of sampling on next to nothing, with the Python around it
    memory: float  # bytes
    link: float  # bytes/s from the other devices of its node
    network: float  # bytes/s of its share of the node's network
    queued: bool  # the device works while the host calls
    source: str

    def given(self, products: float, copy: float) -> "Ceilings":
        """With these products and copies, where they are not 0, and what goes with them in proportion."""
        up, faster = (x / old if x else 1.0 for x, old in ((products, self.products), (copy, self.copy)))
        given = " and ".join(name for name, x in (("products", products), ("copies", copy)) if x)
        return self._replace(
            products=up * self.products,
            head=up * self.head,
            attention=up * self.attention,
            copy=faster * self.copy,
            thin=faster * self.thin,
            sample=faster * self.sample,
            source=f"{given} given, else {self.source}" if given else self.source,
        )


# Dense bfloat16 FLOP/s, bytes/s of memory, bytes, NVLink one way, network card: NVIDIA's data sheets, DGX systems.
SHEETS = {
    "a100": (312e12, 2.04e12, 80e9, 300e9, 25e9),
    "h100": (989e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": (989e12, 4.8e12, 141e9, 450e9, 50e9),
}
# What published kernels reach of them: cuBLAS 684 of 989 TFLOP/s on an H200 (Liger-Kernel, pull request 1356), a scan
# 77 % of an H100's memory (rl-triton). That attention reaches half of the products' and a call takes 5 us is assumed.
REACHED_PRODUCTS, REACHED_COPY, REACHED_ATTENTION, LAUNCH = 0.69, 0.77, 0.5, 5e-6


class Shape(NamedTuple):
    """A decoder, by what the formulas need."""

    flops: UpdateFlops
    matrices: int  # weights below the head
    head: int  # weights of the head
    parameters: int
    trained: int
    layers: int
    hidden: int
    head_dim: int
    queries: int  # values of a row's queries
    gate: int  # values of a row's feed-forward layer
    cached: int  # values that a layer keeps of a token it has read


class Work(NamedTuple):
    """What one device computes in an iteration."""

    num_actions: int
    num_tokens: int  # prompt and response tokens, each answer with its prompt
    num_prompt_tokens: int  # each prompt once
    num_rows: int  # of packed answers that share their prompts
    num_pairs: float  # of a query and a key that it sees
    active: np.ndarray  # [steps] answers that are sampled in each step
    context: np.ndarray  # [steps] tokens that these have before them, in sum
    most_context: int  # of a row's cache


class Phase(NamedTuple):
    """Seconds of a phase by what takes them, and the tokens of all devices."""

    parts: dict[str, float]
    num_tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class Plan(NamedTuple):
    phases: dict[str, Phase]
    memory: dict[str, float]  # bytes of one device
    max_tokens: int  # rows of a micro-batch that fit beside them
    ceilings: Ceilings

    @property
    def step(self) -> Phase:
        """All of them; each answer counts with its prompt."""
        parts = Counter[str]()
        for phase in self.phases.values():
            parts.update(phase.parts)
        return Phase(dict(parts), self.phases["update"].num_tokens)

    @property
    def kernels(self) -> float:
        """Share of the step in which heads and losses, the ops of this package, run."""
        return self.step.parts["head"] / self.step.seconds


@dataclass(kw_only=True)
class Scenario:
    model_shape: str = "7b"
    """A size of Qwen2.5 (0.5b, 1.5b, 3b, 7b, 14b, 32b) or Llama 3 (8b, 70b), or a folder with a config.json."""
    gpus: CountOrNone = 0
    """GPUs of a node; 0: this machine's CPU."""
    nodes: Count = 1
    gpu: Literal["a100", "h100", "h200"] = "h200"
    """Which: ceilings from its data sheet."""
    dtype: Dtype | None = None
    """null: bfloat16 on GPUs, float32 on a CPU."""
    gemm_tflops: NonNegative = 0.0
    """Matrix products that a device computes, 10^12 FLOP/s; 0: measured on a CPU, from the data sheet of a GPU."""
    copy_gb_per_s: NonNegative = 0.0
    """Bytes that a copy on it reads and writes, 10^9 a second; 0: the same."""
    num_prompts: Count = 128
    """Prompts per iteration, of all devices."""
    group_size: Count = 8
    """Answers to each prompt."""
    prompt_tokens: Count = 256
    answer_tokens: Count = 512
    """Tokens of an answer on average; lengths are spread evenly around it up to max_new_tokens."""
    max_new_tokens: Count = 1024
    """Longest answer in tokens, at most twice answer_tokens."""
    scorers: CountOrNone = 1
    """Models of the policy's size that score every answer: Q-RM, PRM, ORM."""
    reference: bool = False
    """Score with a reference policy, too."""
    sampler_gpus: Count = 1
    """GPUs that share the sampler's weights; no engine here does that for more than 1."""
    lora_rank: CountOrNone = 0
    """Rank of adapters in all linear layers, which alone are trained; 0: all weights are."""


def plan(scenario: Scenario) -> Plan:
    """The costs of one iteration of `scenario`.

    Raises ValueError for a number out of range, an unknown shape, a float32 ceiling that no data sheet here gives, and
    a model that leaves no room for a micro-batch.
    """
    check_ranges(scenario)
    num_devices = max(1, scenario.gpus) * scenario.nodes
    if scenario.nodes > 1 and not scenario.gpus:
        raise ValueError(f"nodes are of gpus, expected 1 on a CPU, got {scenario.nodes}")
    if max(1, scenario.gpus) % scenario.sampler_gpus:
        raise ValueError(f"sampler_gpus must divide the gpus of a node, {scenario.gpus}, got {scenario.sampler_gpus}")
    if not scenario.answer_tokens <= scenario.max_new_tokens <= 2 * scenario.answer_tokens:
        raise ValueError(
            f"max_new_tokens must be from answer_tokens, {scenario.answer_tokens}, to twice that, for lengths are "
            f"spread evenly, got {scenario.max_new_tokens}"
        )
    if scenario.num_prompts < num_devices:
        raise ValueError(f"num_prompts must be at least 1 per device, {num_devices}, got {scenario.num_prompts}")
    dtype = getattr(torch, scenario.dtype or ("bfloat16" if scenario.gpus else "float32"))
    if scenario.gpus and dtype == torch.float32 and not scenario.gemm_tflops:
        raise ValueError("the data sheets here are of bfloat16, expected gemm_tflops with dtype float32, got 0")
    shape = shape_of(scenario.model_shape, lora_rank=scenario.lora_rank)
    ceilings = of_sheet(scenario.gpu) if scenario.gpus else measured(shape, dtype)
    ceilings = ceilings.given(1e12 * scenario.gemm_tflops, 1e9 * scenario.copy_gb_per_s)
    prompts = -(-scenario.num_prompts // num_devices)
    shortest = 2 * scenario.answer_tokens - scenario.max_new_tokens
    lengths = np.linspace(max(1, shortest), scenario.max_new_tokens, prompts * scenario.group_size).round().astype(int)
    work = work_of(
        scenario.prompt_tokens, lengths[np.random.default_rng(0).permutation(len(lengths))], scenario.group_size
    )
    devices = Devices(max(1, scenario.gpus), scenario.nodes, scenario.sampler_gpus)
    most = math.inf if scenario.gpus else max(CPU_TOKENS, work.most_context)
    return costs(shape, work, ceilings, dtype, devices, scenario.scorers, scenario.reference, most_tokens=most)


class Devices(NamedTuple):
    per_node: int = 1
    nodes: int = 1
    per_sampler: int = 1  # that share the weights of one sampler

    @property
    def number(self) -> int:
        return self.per_node * self.nodes

    def gather(self, num_bytes: float, ceilings: Ceilings) -> float:
        """Seconds until every device has `num_bytes` that all share: over its links, or its node's network."""
        inside = num_bytes * (self.number - 1) / self.number / ceilings.link if self.number > 1 else 0.0
        outside = num_bytes * (self.nodes - 1) / self.nodes / (self.per_node * ceilings.network)
        return max(inside, outside)


def shape_of(spec: str, *, lora_rank: int = 0) -> Shape:
    """Of a model that `config_of` knows. No weight is allocated."""
    config = config_of(spec)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shape_of_policy(Policy(model.requires_grad_(not lora_rank)), lora_rank=lora_rank)


def config_of(spec: str) -> PreTrainedConfig:
    """Of a name of SHAPES, or of the folder of a config.json. Raises ValueError for another name."""
    if spec in SHAPES:
        kind, hidden, gate, layers, heads, keys, ids, tied = SHAPES[spec]
        return kind(
            hidden_size=hidden,
            intermediate_size=gate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys,
            vocab_size=ids,
            tie_word_embeddings=tied,
        )
    try:
        return AutoConfig.from_pretrained(spec, local_files_only=True).get_text_config()
    except OSError:
        raise ValueError(
            f"model_shape must be one of {', '.join(SHAPES)}, or a folder with a config.json, got {spec}"
        ) from None


def shape_of_policy(policy: Policy, *, lora_rank: int = 0) -> Shape:
    below, config = backbone(policy.model), policy.model.config.get_text_config()
    linear = [x for x in below.modules() if isinstance(x, nn.Linear)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    flops, adapters = update_flops(policy), lora_rank * sum(x.in_features + x.out_features for x in linear)
    return Shape(
        flops=flops._replace(per_token=flops.per_token + 6 * adapters),
        matrices=sum(x.weight.numel() for x in linear),
        head=policy.head().weight.numel(),
        parameters=sum(p.numel() for p in policy.parameters()),
        trained=adapters or sum(p.numel() for p in policy.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        head_dim=head_dim,
        queries=config.num_attention_heads * head_dim,
        gate=config.intermediate_size,
        cached=2 * config.num_key_value_heads * head_dim,
    )


def work_of(prompt: int, lengths: Sequence[int] | np.ndarray, group_size: int) -> Work:
    """Of answers of these lengths, `group_size` neighbours to a prompt of so many tokens, sampled ROWS at a time."""
    n = np.asarray(lengths)
    num_prompts = len(n) // group_size
    # as one answer's row of the cache is free the next one takes it
    free, starts = [0] * min(ROWS, len(n)), np.zeros(len(n), dtype=int)
    for i, length in enumerate(n.tolist()):
        starts[i] = heapq.heappop(free)
        heapq.heappush(free, int(starts[i]) + length)
    steps = np.arange(max(free))[:, None]  # [steps, 1]
    active = np.zeros(len(steps), dtype=int)
    context = np.zeros(len(steps), dtype=int)
    for start, length in zip(starts, n, strict=True):
        active[start : start + length] += 1
        context[start : start + length] += prompt + np.arange(length)
    own = n + 1.0  # rows of an answer: the prompt's last token, its own
    before = prompt - 1
    pairs = num_prompts * before * (before + 1) / 2 + (own * before + own * (own + 1) / 2).sum()
    return Work(
        num_actions=int(n.sum()),
        num_tokens=int((n + prompt).sum()),
        num_prompt_tokens=num_prompts * prompt,
        num_rows=int(num_prompts * before + own.sum()),
        num_pairs=float(pairs),
        active=active,
        context=context,
        most_context=int(prompt + n.max()),
    )


ONE = Devices()


def costs(
    shape: Shape,
    work: Work,
    ceilings: Ceilings,
    dtype: torch.dtype,
    devices: Devices = ONE,
    scorers: int = 0,
    reference: bool = False,
    *,
    most_tokens: float = math.inf,
) -> Plan:
    """Phases and memory of one device's `work`; the tokens are those of all.

    A micro-batch has as many packed tokens as fit, but not more than `most_tokens`.
    """
    size = dtype.itemsize
    whole = size * shape.parameters  # bytes of all weights
    memory, max_tokens = _memory(shape, work, ceilings, size, devices, scorers + reference, most_tokens)
    num_batches = -(-work.num_rows // max_tokens)

    parts = _rollout(shape, work, ceilings, size, devices.per_sampler)
    parts["sharding"] += devices.gather(whole, ceilings)
    phases = {"rollout": Phase(parts, devices.number * work.num_actions)}

    def passes(parts: dict[str, float], gathered: float) -> Phase:
        """Of packed answers, while the layers of the next micro-batch, so many bytes, are gathered."""
        waits = num_batches * devices.gather(gathered, ceilings) - sum(parts.values())
        return Phase(parts | {"sharding": max(0.0, waits)}, devices.number * work.num_tokens)

    if scorers or reference:
        parts = _forward(shape, work, ceilings, size, scorers + reference, 1 if reference else 0)
        phases["score"] = passes(parts, (scorers + reference) * whole)
    parts = _update(shape, work, ceilings, size, shape.trained / devices.number)
    phases["update"] = passes(parts, 2 * whole + 4 * shape.trained)  # in both directions, and float32 gradients
    return Plan(phases, memory, max_tokens, ceilings)


def _memory(
    shape: Shape, work: Work, ceilings: Ceilings, size: int, devices: Devices, num_scorers: int, most_tokens: float
) -> tuple[dict[str, float], int]:
    """Bytes of a device at its peak, and the packed tokens of a micro-batch."""
    whole = size * shape.parameters
    kept = {
        "weights": whole / devices.number,
        "optimiser and gradients": (12 if size == 4 else 16) * shape.trained / devices.number,
        "scorers and reference": num_scorers * whole / devices.number,
    }
    sampling = {
        "weights, gathered": whole / devices.per_sampler if devices.number > 1 else 0.0,
        "keys and values": size * shape.layers * shape.cached * int(work.active.max()) * work.most_context,
    }
    saved = sum(num * getattr(shape, of) for of, num in SAVED.items()) * size
    saved += 16 * shape.hidden if size == 2 else 0  # norms are float32
    per_row = shape.layers * saved + 2 * size * shape.hidden
    most = min(work.num_rows, most_tokens)
    updating = {
        "layers, gathered": 2 * whole / shape.layers if devices.number > 1 else 0.0,
        "head": 4.0 * shape.head + _kept_logits(shape.head // shape.hidden, most, ceilings.queued),
    }
    room = FREE * ceilings.memory - sum(kept.values())
    freed = {} if ceilings.queued else sampling  # which malloc keeps, in pieces of other sizes
    fitting = int((room - sum(updating.values()) - sum(freed.values())) / per_row) // 256 * 256
    max_tokens = int(min(most, fitting))
    if max_tokens < 1 or room < sum(sampling.values()):
        gigabytes = [x / 1e9 for x in (sum(kept.values()), sum(sampling.values()), FREE * ceilings.memory)]
        raise ValueError(
            "weights, optimiser and scorers must leave room to sample and for a micro-batch, got {:,.0f} GB of them "
            "and {:,.0f} GB to sample, of {:,.0f} GB of a device".format(*gigabytes)
        )
    updating |= {"activations": float(per_row * max_tokens)}
    return kept | max((sampling, freed | updating), key=lambda parts: sum(parts.values())), max_tokens


def _kept_logits(vocab: int, rows: float, on_gpu: bool) -> float:
    """Bytes of the logits that `linear_policy_loss` holds at a time: docs/heads.md."""
    if on_gpu:
        return min(2.0 * rows * vocab, 1.45e9)
    return 4.0 * vocab * min(max(rows / 8, 192), 960)


def _rollout(shape: Shape, work: Work, ceilings: Ceilings, size: int, per_sampler: int) -> dict[str, float]:
    """Every step reads weights and cache once, or computes for its rows, whichever takes longer.

    Samplers of several devices answer for all of them, so that a device reads a part of the weights.
    """
    active, steps = np.maximum(work.active, 1), len(work.active)

    def product(weights: int, read: float, flops: float) -> float:
        return np.maximum(2 * weights * active / flops, size * weights / per_sampler / read).sum()

    values, pairs = shape.cached * work.context, 4 * shape.queries * work.context
    parts = {
        "products": product(shape.matrices, ceilings.thin, ceilings.products),
        "head": product(shape.head, ceilings.sample, ceilings.head),
        "attention": shape.layers * np.maximum(size * values / ceilings.thin, pairs / ceilings.attention).sum(),
        "element-wise": _passes(shape) / 3 * active.sum() * size / ceilings.copy,
    }
    calls = steps * shape.layers * CALLS_PER_LAYER * ceilings.call
    if ceilings.queued:  # the host calls while the device computes
        calls = max(0.0, calls - sum(parts.values()))
    parts["products"] += 2 * shape.matrices * work.num_prompt_tokens / ceilings.products
    summed = 2 * steps * shape.layers if per_sampler > 1 else 0  # sums of a layer's results over its devices
    volume = 4 * shape.layers * size * shape.hidden * active.sum() * (per_sampler - 1)
    parts |= {"calls": calls, "sharding": summed * ceilings.call + volume / ceilings.link}
    return {name: float(seconds) for name, seconds in parts.items()}


def _update(shape: Shape, work: Work, ceilings: Ceilings, size: int, trained: float) -> dict[str, float]:
    return {
        "products": shape.flops.per_token * work.num_rows / ceilings.products,
        "head": shape.flops.per_action * work.num_actions / ceilings.head,
        "attention": shape.flops.per_pair * work.num_pairs / ceilings.attention,
        "element-wise": _passes(shape) * work.num_rows * size / ceilings.copy,
        "optimiser": OPTIMIZER_PASSES * 4 * trained / ceilings.copy,
    }


def _forward(
    shape: Shape, work: Work, ceilings: Ceilings, size: int, num_models: int, num_heads: int
) -> dict[str, float]:
    return {
        "products": num_models * 2 * shape.matrices * work.num_rows / ceilings.products,
        "head": num_heads * 2 * shape.head * work.num_actions / ceilings.head,
        "attention": num_models * shape.flops.per_pair / 3 * work.num_pairs / ceilings.attention,
        "element-wise": num_models * _passes(shape) / 3 * work.num_rows * size / ceilings.copy,
    }


def _passes(shape: Shape) -> float:
    return shape.layers * sum(num * getattr(shape, of) for of, num in PASSES.items())


def of_sheet(gpu: str) -> Ceilings:
    flops, memory_rate, memory, link, network = SHEETS[gpu]
    products, copy = REACHED_PRODUCTS * flops, REACHED_COPY * memory_rate
    return Ceilings(
        products=products,
        head=products,
        attention=REACHED_ATTENTION * products,
        copy=copy,
        thin=copy,
        sample=copy,
        call=LAUNCH,
        memory=memory,
        link=link,
        network=network,
        queued=True,
        source=f"data sheet of {gpu.upper()}, {REACHED_PRODUCTS:.0%} of its products and {REACHED_COPY:.0%} of its "
        "memory as published kernels reach; not measured",
    )


def measured(shape: Shape, dtype: torch.dtype) -> Ceilings:
    """Those of this machine's CPU, in some two seconds: the fastest of several calls, at the widths of `shape`."""
    hidden, gate, ids = min(shape.hidden, 2048), min(shape.gate, 8192), min(shape.head // shape.hidden, 32768)
    layers = [
        nn.Linear(hidden, gate, bias=False, dtype=dtype) for _ in range(-(-LARGE // (hidden * gate * dtype.itemsize)))
    ]
    for layer in layers:
        use_onednn(layer)
    rows = torch.ones(2048, hidden, dtype=dtype, requires_grad=True)
    few, head = rows[:16].detach(), torch.ones(ids, hidden, dtype=dtype, requires_grad=True)
    num_heads, num_layers = shape.queries // shape.head_dim, min(shape.layers, 8)
    pairs = torch.ones(4, num_heads, 256, shape.head_dim, dtype=dtype, requires_grad=True)
    source = torch.ones(LARGE // 4)
    target, uniforms = torch.empty_like(source), torch.full((16,), 0.5, dtype=torch.float64)
    targets, advantages = torch.zeros(512, dtype=torch.int64), torch.ones(512)

    def backward(x: Tensor) -> None:
        x.backward(torch.ones_like(x))

    def attention() -> None:
        backward(nn.functional.scaled_dot_product_attention(pairs, pairs, pairs, is_causal=True))

    def thin() -> None:
        for layer in layers:
            layer(few)

    tall = _fastest(lambda: backward(layers[0](rows)))
    loss = _fastest(lambda: linear_policy_loss(rows[:512], head, targets, advantages).loss.backward())
    with torch.no_grad():
        read, drawn = _fastest(thin), _fastest(lambda: linear_sample(few, head, uniforms))
    return Ceilings(
        products=6 * len(rows) * hidden * gate / tall,
        head=6 * len(targets) * head.numel() / loss,
        attention=12 * pairs.numel() * 256 / 2 / _fastest(attention),
        copy=2 * source.nbytes / _fastest(lambda: target.copy_(source)),
        thin=sum(layer.weight.nbytes for layer in layers) / read,
        sample=head.nbytes / drawn,
        call=_step_of_nothing(num_layers) / (num_layers * CALLS_PER_LAYER),
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        link=math.inf,
        network=math.inf,
        queued=False,
        source="measured on this CPU",
    )


def _step_of_nothing(num_layers: int) -> float:
    """Seconds of a step of sampling by the engine of this process, from a model so narrow that only calls take time."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="qrm_packed", dtype=torch.float32)
    use_onednn(model)
    keep_less(model)
    engine, num_steps = TransformersEngine(Policy(model), [64]), 32
    return _fastest(lambda: engine.generate([[1]], max_new_tokens=num_steps, temperature=1.0, seed=0)) / num_steps


def _fastest(call: Callable[[], object], seconds: float = 0.25) -> float:
    call()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
