"""Sampling of the answers of one iteration, 32 at a time, beside what transformers has for it."""

import math
from importlib.util import find_spec

import torch

from .harness import Case, case, gemm
from .qwen2 import VOCABULARY, qwen2

GROUP, ROWS, ANSWER, LONGEST = 8, 32, 96, 300


def sampled_answers(device: torch.device, prompt: int, width: int, num_layers: int) -> Case:
    """8 answers to each of 8 prompts, float32. Their lengths, log-normal around 96 up to 300, are the same for all."""
    from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteriaList

    from qrm_fast.rl.linear import use_onednn
    from qrm_fast.rl.policy import Policy
    from qrm_fast.rl.rollout import TransformersEngine, check_sampling

    from .forced import Ended, ForcedEngine

    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(8 * GROUP, generator=generator) * 0.6 + math.log(ANSWER)).clamp(8, LONGEST).long()
    prompts = torch.randint(2, VOCABULARY, (8, prompt), generator=generator)
    (model, num_parameters), (plain, _), (paged, _) = (qwen2(width, num_layers) for _ in range(3))
    model.set_attn_implementation("qrm_packed")
    use_onednn(model)
    options = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=LONGEST, eos_token_id=-1)
    sampling = GenerationConfig(**options, pad_token_id=0)

    answers = [[0] * n for n in lengths.tolist()]
    of_prompts = {tuple(p): answers[i * GROUP :][:GROUP] for i, p in enumerate(prompts.tolist())}
    policy = Policy(model)
    engine = ForcedEngine(policy, of_prompts, max_rows=ROWS)

    def ours() -> list[list[int]]:
        options = dict(num_samples=GROUP, max_new_tokens=LONGEST, temperature=1.0, seed=0)
        return engine.generate(prompts.tolist(), **options).responses

    def generate() -> list[list[int]]:
        answers = []
        for i in range(0, len(lengths), ROWS):
            rows = lengths[i : i + ROWS]
            ids = prompts[i // GROUP : (i + ROWS) // GROUP].repeat_interleave(GROUP, 0)
            ended = StoppingCriteriaList([Ended(prompt, rows)])
            options = dict(attention_mask=torch.ones_like(ids), stopping_criteria=ended)
            out = plain.generate(ids, generation_config=sampling, **options)
            answers += [row[:n] for row, n in zip(out[:, prompt:].tolist(), rows.tolist(), strict=True)]
        return answers

    def generate_batch() -> list[list[int]]:
        batching = ContinuousBatchingConfig(
            page_size=32, num_blocks=1 + ROWS * (prompt + LONGEST) // 32, max_batch_tokens=512
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
        check_sampling(TransformersEngine(policy, [1]), policy, prompt + LONGEST)

    num_tokens = int(lengths.sum())
    one = 2 * num_tokens * VOCABULARY * width  # the logits
    flops = one + 2 * (num_tokens + prompts.numel()) * num_parameters  # attention's own products left out
    return Case(
        {
            "qrm_fast": ours,
            "transformers, generate": generate,
            "transformers, continuous batching": generate_batch,
        },
        gate=gate,
        baseline=gemm(torch.randn(ROWS, width), torch.randn(VOCABULARY, width)),
        num_baselines=flops / (2 * ROWS * VOCABULARY * width),
        flops=flops,
        repeats=2,
    )


if find_spec("transformers"):
    case(cpu=[{"prompt": 200, "width": 256, "num_layers": 6}])(sampled_answers)
