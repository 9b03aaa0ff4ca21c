"""A whole step of training, sampling included, beside TRL's: same model, prompts, answers, rewards and step.

Run where TRL is installed, `make bench-trl`; elsewhere there is only our own update, packed beside padded.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .drawn import FIRST, GROUP, LONGEST, RIGHT, WRONG, Data, drawn
from .harness import Case, case, gemm
from .qwen2 import VOCABULARY, qwen2
from .shares import shares

LR = 1e-4


def words_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "0": WRONG, "1": RIGHT} | {f"w{i}": i for i in range(FIRST, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


class Phases:
    """Seconds of the parts of every step."""

    def __init__(self, data: Data) -> None:
        self.data, self.seconds = data, defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)

    def figures(self) -> dict[str, float]:
        """Of the steps after the first."""
        s = {name: median(seconds[1:] or seconds) for name, seconds in self.seconds.items()}
        return {
            "sampling, tokens/s": self.data.num_actions / s["rollout"],
            "update, tokens/s": self.data.num_tokens / s["update"],
            "step, tokens/s": self.data.num_tokens / s["step"],
            "sampling, s": s["rollout"],
            "update, s": s["update"],
        }


class Ours:
    """The loop itself, one iteration a call."""

    def __init__(self, folder: str, data: Data) -> None:
        from qrm_fast.rl.config import Config, preset
        from qrm_fast.rl.data import Example, Rows
        from qrm_fast.rl.run_folder import RunFolder
        from qrm_fast.rl.train import learn, load_parts

        from .forced import ForcedEngine

        tokenizer, count = words_tokenizer(), len(data.prompts)
        # the gradient of GRPO on its own samples is REINFORCE's, with rewards minus their group's mean
        method = preset("rloo") | dict(baseline="dr_grpo", loss_mode="token-mean")
        self.config = Config(
            **method,
            model=folder,
            data="",
            out=f"{folder}/ours",
            num_iterations=1,
            num_prompts=count,
            group_size=GROUP,
            max_new_tokens=LONGEST,
            lr=LR,
        )
        examples = Rows([Example(tokenizer.decode(p), "1") for p in data.prompts], ["here"] * count)
        longest = len(data.prompts[0]) + LONGEST
        parts = load_parts(self.config, tokenizer, longest, longest)
        answers = {tuple(p): data.answers[i * GROUP :][:GROUP] for i, p in enumerate(data.prompts)}
        self.model = parts.policy.model
        self.parts = parts._replace(engine=ForcedEngine(parts.policy, answers))
        self.learn = partial(
            learn, self.config, RunFolder(self.config), self.parts, tokenizer, examples, Rows[Example]([], [])
        )
        self.phases = Phases(data)

    def __call__(self) -> dict[str, float]:
        with self.phases("step"):
            (row,) = self.learn()
        for name in ("rollout", "update"):
            self.phases.seconds[name].append(row[f"time/{name}_s"])
        return {"grad_norm": row["policy/grad_norm"], "reward": row["reward/mean"]}


def trl_trainer(folder: str, data: Data, rows_at_a_time: int) -> Any:
    """TRL's GRPO trainer, one step a call of `step`: float32, and no gradient checkpointing, which costs time."""
    from datasets import Dataset
    from transformers import PrinterCallback, StoppingCriteriaList
    from trl import GRPOConfig, GRPOTrainer

    from .forced import Ended

    tokenizer = words_tokenizer()

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **options: Any) -> Any:
            left = {tuple(p): data.answers[i * GROUP :][:GROUP] for i, p in enumerate(data.prompts)}
            answers = [left[tuple(prompt)].pop(0) for prompt in prompt_ids]
            ended = Ended(len(prompt_ids[0]), torch.tensor(list(map(len, answers))))
            generate = self.model.generate
            self.model.generate = partial(generate, stopping_criteria=StoppingCriteriaList([ended]))
            with self.phases("rollout"):
                _, logprobs = super()._generate_single_turn(prompt_ids, *others, **options)
            del self.model.generate
            return answers, logprobs

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with self.phases("sampled and scored"):
                return super()._generate_and_score_completions(inputs)

        def step(self) -> dict[str, float]:
            with self.phases("step"):
                self.train()
            seconds = self.phases.seconds
            seconds["update"].append(seconds["step"][-1] - seconds["sampled and scored"][-1])
            row = next(row for row in self.state.log_history if "grad_norm" in row)
            return {"grad_norm": row["grad_norm"], "reward": row["reward"]}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(text.split()[-1] == "1") for text in completions]

    num_answers = len(data.answers)
    arguments = GRPOConfig(
        output_dir=f"{folder}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=1,
        per_device_train_batch_size=rows_at_a_time,
        gradient_accumulation_steps=num_answers // rows_at_a_time,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        temperature=1.0,
        scale_rewards="none",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
    )
    rows = Dataset.from_dict({"prompt": [tokenizer.decode(p) for p in data.prompts]})
    trainer = Trainer(model=folder, args=arguments, reward_funcs=reward, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.phases = Phases(data)
    return trainer


def training_step(device: torch.device, num_answers: int, prompt: int, width: int, num_layers: int) -> Case:
    """One iteration: the answers sampled, judged, and learned from. TRL takes a group of answers at a time."""
    from qrm_fast.rl.cost_model import measured, shape_of_policy
    from qrm_fast.rl.train import plan

    data = drawn(num_answers, prompt)
    folder = tempfile.TemporaryDirectory()
    model, num_parameters = qwen2(width, num_layers)
    model.save_pretrained(folder.name)
    ours, trl = Ours(folder.name, data), trl_trainer(folder.name, data, GROUP)
    own = f"trl {version('trl')}"
    start = [p.detach().clone() for p in ours.model.parameters()]

    def gate() -> None:
        """Called before any other step: both start from the same weights."""
        assert Path(folder.name).is_dir()  # both write there, so it lasts as long as the case
        got, want = ours(), trl.step()
        for name, x in want.items():
            assert abs(got[name] - x) <= 1e-3 * abs(x), f"{name} is {got[name]:.6g}, and {x:.6g} by {own}"
        moved, far = 0.0, 0.0
        for a, b, x in zip(ours.model.parameters(), trl.model.parameters(), start, strict=True):
            moved, far = moved + (b - x).norm() ** 2, far + (a - b).norm() ** 2
        assert far <= 1e-3 * moved, f"the weights differ by {(far / moved) ** 0.5:.2g} of the way they went"

    one = 2 * data.num_actions * VOCABULARY * width  # the logits, once
    policy = ours.parts.policy

    def machine() -> dict[str, float]:
        """What the cost model asks of a machine."""
        ceilings = measured(shape_of_policy(policy), torch.float32)._asdict()
        return {name: x for name, x in ceilings.items() if isinstance(x, float) and isfinite(x)}

    flops = 8 * data.num_tokens * num_parameters + 4 * one  # sampled and updated, attention's own products left out
    ways = {"qrm_fast": ours, own: trl.step}
    phases = {"qrm_fast": ours.phases, own: trl.phases}
    lengths = [prompt + len(answer) for answer in data.answers]
    [microbatches] = plan(list(range(num_answers)), lengths, [prompt] * num_answers, 1, ours.config, 0)
    passes = {"qrm_fast": len(microbatches), own: num_answers // GROUP}
    return Case(
        ways,
        gate=gate,
        baseline=gemm(torch.randn(data.num_actions, width), torch.randn(VOCABULARY, width)),
        num_baselines=flops / one,
        flops=flops,
        repeats=2,
        details=lambda way, _: phases[way].figures() | {"micro-batches": passes[way]},
        machine=machine,
        shares=partial(shares, ours),
    )


def packed_update(device: torch.device, num_answers: int, prompt: int, width: int, num_layers: int) -> Case:
    """Loss and gradients of the same answers by one model and head: packed rows beside rows padded to the longest."""
    from qrm_fast import pack
    from qrm_fast.rl.gated import keep_less
    from qrm_fast.rl.linear import use_onednn
    from qrm_fast.rl.policy import Policy

    data = drawn(num_answers, prompt)
    (model, num_parameters), (other, _) = (qwen2(width, num_layers) for _ in range(2))
    model.set_attn_implementation("qrm_packed")
    policy, padded_policy = (Policy(x.train()) for x in (model, other))
    for x in (model, other):
        use_onednn(x)
        keep_less(x)
    # in groups, each from the shortest to the longest, as the loop packs them
    groups = [sorted(data.answers[i : i + GROUP], key=len) for i in range(0, num_answers, GROUP)]
    sequences = [p + answer for p, group in zip(data.prompts, groups, strict=True) for answer in group]
    batch = pack(sequences, [prompt] * num_answers)
    advantages = torch.randn(len(batch.action_index), generator=torch.Generator().manual_seed(0))
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    mask = torch.arange(rows.shape[1]) < batch.cu_seqlens.diff()[:, None]  # [S, L]

    def packed() -> tuple[Tensor, list[Tensor]]:
        loss = policy.loss(batch, advantages).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(policy.parameters())))

    def padded() -> tuple[Tensor, list[Tensor]]:
        hidden = other.model(input_ids=rows, attention_mask=mask.long(), use_cache=False).last_hidden_state
        targets = batch.targets[batch.action_index]
        loss = padded_policy.head().loss(hidden[mask][batch.action_index], targets, advantages).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(other.parameters())))

    def gate() -> None:
        (loss, gradients), (expected, theirs) = packed(), padded()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        a, b = (torch.cat([x.flatten() for x in xs]) for xs in (gradients, theirs))
        assert (a - b).norm() <= 1e-4 * b.norm(), f"gradients differ by {(a - b).norm() / b.norm():.2g} of their norm"

    one = 2 * len(batch.action_index) * VOCABULARY * width  # the logits, once
    flops = 6 * len(batch.input_ids) * num_parameters + 3 * one  # attention's own products left out
    return Case(
        {"qrm_fast, packed": packed, "qrm_fast, padded": padded},
        gate=gate,
        baseline=gemm(torch.randn(len(batch.action_index), width), torch.randn(VOCABULARY, width)),
        num_baselines=flops / one,
        flops=flops,
        repeats=3,
    )


HEAD_HEAVY = {"width": 256, "num_layers": 6}
WIDE = {"width": 512, "num_layers": 8}
APART = [{"num_answers": 32, "prompt": 8} | HEAD_HEAVY, {"num_answers": 16, "prompt": 8} | WIDE]
SHARED = [{"num_answers": 16, "prompt": 200} | HEAD_HEAVY, {"num_answers": 8, "prompt": 200} | WIDE]
if find_spec("transformers"):
    case(cpu=APART)(packed_update)
if find_spec("trl"):
    case(cpu=APART + SHARED)(training_step)
