"""Sampling of the answers of one iteration, so many rows at a time, beside what transformers has for it."""

import math
from importlib.util import find_spec
from typing import Any

import torch

from .harness import Case, Provider, case, gemm
from .qwen2 import model_of, policy_of

GROUP, LONGEST = 8, 300


def sampled_answers(
    device: torch.device,
    prompt: int,
    rows: int = 32,
    groups: int = 8,
    answer: int = 96,
    continuous: bool = True,
    **size: Any,
) -> Case:
    """8 answers to each prompt; float32, and of a published shape bfloat16.

    Their lengths, log-normal around `answer` up to 300, are the same for all. On CUDA `continuous` batching has a case
    of its own, for what hangs there is lost with its case.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    from qrm_fast.rl.rollout import TransformersEngine, check_sampling

    from .forced import Ended, ForcedEngine

    policy, plain, paged = policy_of(device, **size), model_of(device, **size), model_of(device, **size)
    vocabulary, width = policy.head().weight.shape
    num_parameters = sum(p.numel() for p in plain.model.layers.parameters())
    longest = min(LONGEST, 4 * answer)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(groups * GROUP, generator=generator) * 0.6 + math.log(answer))
    lengths = lengths.clamp(8, longest).long()
    prompts = torch.randint(2, vocabulary, (groups, prompt), generator=generator)
    options = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=longest, eos_token_id=-1)
    sampling = GenerationConfig(**options, pad_token_id=0)

    answers = [[0] * n for n in lengths.tolist()]
    of_prompts = {tuple(p): answers[i * GROUP :][:GROUP] for i, p in enumerate(prompts.tolist())}

    def ours(**how: Any) -> list[list[int]]:
        engine = ForcedEngine(policy, of_prompts, max_rows=rows, **how)
        options = dict(num_samples=GROUP, max_new_tokens=longest, temperature=1.0, seed=0)
        return engine.generate(prompts.tolist(), **options).responses

    def generate() -> list[list[int]]:
        answers = []
        for i in range(0, len(lengths), rows):
            taken = lengths[i : i + rows]
            ids = prompts[i // GROUP : (i + rows) // GROUP].repeat_interleave(GROUP, 0).to(device)
            ended = StoppingCriteriaList([Ended(prompt, taken.to(device))])
            options = dict(attention_mask=torch.ones_like(ids), stopping_criteria=ended)
            out = plain.generate(ids, generation_config=sampling, **options)
            answers += [row[:n] for row, n in zip(out[:, prompt:].tolist(), taken.tolist(), strict=True)]
        return answers

    def generate_batch() -> list[list[int]]:
        from transformers import ContinuousBatchingConfig

        batching = ContinuousBatchingConfig(
            page_size=32, num_blocks=1 + rows * (prompt + longest) // 32, max_batch_tokens=512
        )
        answers: dict[str, list[int]] = {}
        with paged.continuous_batching_context_manager(
            generation_config=sampling, continuous_batching_config=batching
        ) as manager:
            asked = prompts.repeat_interleave(GROUP, 0).tolist()
            names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(asked, lengths.tolist(), strict=True)]
            while len(answers) < len(names):
                result = manager.get_result(timeout=60)
                assert result is not None and result.error is None, result
                if result.is_finished():
                    answers[result.request_id] = result.generated_tokens
        return [answers[name] for name in names]

    def gate() -> None:
        check_sampling(TransformersEngine(policy, [1]), policy, prompt + longest)

    ways: dict[str, Provider] = {"qrm_fast": ours}
    if device.type == "cuda":
        ways["qrm_fast, without CUDA graphs"] = lambda: ours(fixed=False)
    if device.type == "cpu" or not continuous:
        ways["transformers, generate"] = generate
    if continuous:
        ways["transformers, continuous batching"] = generate_batch
    num_tokens = int(lengths.sum())
    one = 2 * num_tokens * vocabulary * width  # the logits
    flops = one + 2 * (num_tokens + prompts.numel()) * num_parameters  # attention's own products left out
    weight = policy.head().weight.detach()
    return Case(
        ways,
        gate=gate,
        baseline=gemm(torch.randn(rows, width).to(weight), weight),
        num_baselines=flops / (2 * rows * vocabulary * width),
        flops=flops,
        repeats=2,
        details=lambda way, ms: {"tokens/s": 1e3 * num_tokens / ms},
    )


if find_spec("transformers"):
    published = {"shape": "1.5b", "prompt": 200, "rows": 256, "groups": 48, "answer": 64}
    both = [published | {"continuous": x} for x in (False, True)]
    case(cpu=[{"prompt": 200, "width": 256, "num_layers": 6}], cuda=both)(sampled_answers)
