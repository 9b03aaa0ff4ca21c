"""One update of another library's trainer: the loss of a micro-batch and its gradients, by its own path and by ours.

Run where the trainer is installed, `make bench-trl`; elsewhere there are no cases.
"""

import math
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .harness import Case, case, gemm
from .qwen2 import VOCABULARY, qwen2

GROUP, PROMPT, COMPLETION = 8, 200, 800
Update = tuple[Tensor, list[Tensor]]  # loss, gradients


def answers(num_answers: int) -> dict[str, Tensor]:
    """What GRPO updates on: padded answers of log-normal length around 160 to prompts of 100 to 200 tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(PROMPT // 2, PROMPT + 1, (num_answers // GROUP,), generator=generator).repeat_interleave(
        GROUP
    )
    lengths = torch.exp(torch.randn(len(prompts), generator=generator) * 0.7 + math.log(160))
    lengths = lengths.clamp(8, COMPLETION).long()
    width, columns = int(prompts.max()), int(lengths.max())
    prompt_mask = (torch.arange(width) >= width - prompts[:, None]).long()
    completion_mask = (torch.arange(columns) < lengths[:, None]).long()
    prompt_ids = torch.randint(2, VOCABULARY, (num_answers // GROUP, width), generator=generator).repeat_interleave(
        GROUP, 0
    )
    completion_ids = torch.randint(2, VOCABULARY, completion_mask.shape, generator=generator)
    return dict(
        prompt_ids=prompt_ids * prompt_mask,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids * completion_mask,
        completion_mask=completion_mask,
        advantages=torch.randn(len(prompts), generator=generator),
        num_items_in_batch=completion_mask.sum(),
    )


def checkpoint(folder: str, width: int, num_layers: int) -> int:
    """A Qwen2 of random weights and a tokenizer of as many words; returns the parameters below the head."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model, num_parameters = qwen2(width, num_layers)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return num_parameters


def grpo_trainer(kind: Callable, folder: str, num_answers: int) -> Any:
    """A GRPO trainer on the checkpoint in `folder`, as it is inside a training step."""
    from datasets import Dataset
    from trl import GRPOConfig

    arguments = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=num_answers,
        num_generations=GROUP,
        max_completion_length=COMPLETION,
    )
    rows = Dataset.from_dict({"prompt": ["w2"]})
    trainer = kind(model=folder, args=arguments, reward_funcs=lambda **_: [], train_dataset=rows)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_update(device: torch.device, num_answers: int, width: int, num_layers: int) -> Case:
    """GRPO's loss of so many answers and its gradients, float32."""
    from trl import GRPOTrainer

    from qrm_fast.integrations.trl import PackedForward, use_linear_logprobs

    class PackedGRPOTrainer(PackedForward, GRPOTrainer):
        pass

    with tempfile.TemporaryDirectory() as folder:
        num_parameters = checkpoint(folder, width, num_layers)
        stock, packed = (grpo_trainer(kind, folder, num_answers) for kind in (GRPOTrainer, PackedGRPOTrainer))
    batch = answers(num_answers)

    def update(trainer: Any) -> Update:
        loss = trainer.compute_loss(trainer.model, batch)
        return loss.detach(), list(torch.autograd.grad(loss, list(trainer.model.parameters())))

    def with_our_head() -> Update:
        with use_linear_logprobs():
            return update(stock)

    def gate() -> None:
        loss, gradients = update(stock)
        norm = torch.cat([x.flatten() for x in gradients]).norm()
        for got_loss, got_gradients in (with_our_head(), update(packed)):
            torch.testing.assert_close(got_loss, loss, rtol=0, atol=1e-5)
            differences = [(a - b).flatten() for a, b in zip(got_gradients, gradients, strict=True)]
            far = torch.cat(differences).norm() / norm
            assert far <= 1e-4, f"gradients differ by {far:.2g} of their norm"

    num_actions = int(batch["completion_mask"].sum())
    num_tokens = num_actions + int(batch["prompt_mask"].sum())
    one = 2 * num_actions * VOCABULARY * width  # the logits, once
    flops = 6 * num_tokens * num_parameters + 4 * one  # attention's own products left out
    own = f"trl {version('trl')}"
    return Case(
        {
            "qrm_fast, packed forward and head": lambda: update(packed),
            f"qrm_fast, head under {own}": with_our_head,
            own: lambda: update(stock),
        },
        gate=gate,
        baseline=gemm(torch.randn(num_actions, width), torch.randn(VOCABULARY, width)),
        num_baselines=flops / one,
        flops=flops,
        repeats=3,
    )


if find_spec("trl"):
    shapes = [{"width": 256, "num_layers": 6}, {"width": 512, "num_layers": 8}]
    case(cpu=[{"num_answers": 8} | shape for shape in shapes])(trl_update)
