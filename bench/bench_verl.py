"""verl's advantages and verl's update, as verl runs them and with the plugins: `make bench-verl`.

Without verl there is no case here.
"""

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .drawn import drawn
from .harness import Case, Provider, case, copy, gemm
from .provenance import ROOT
from .qwen2 import VOCABULARY

INSTALLED = importlib.util.find_spec("verl") is not None
VERL = f"verl {importlib.metadata.version('verl')}" if INSTALLED else ""


def on_cpu():
    """What the tests run verl's engine with. Its environment has to be there before verl."""
    sys.path.append(str(ROOT / "tests/integrations"))
    return importlib.import_module("verl_on_cpu")


@case(cpu=[{"num_sequences": 64, "width": 8192}] if INSTALLED else [])
def verl_gae(device: torch.device, num_sequences: int, width: int) -> Case:
    """Padded [B, T] in, whitened advantages and returns out; a tenth of the tokens are a tool's."""
    verl_on_cpu = on_cpu()
    from verl.trainer.ppo import core_algos

    from qrm_fast.integrations.padded import compute_gae_advantage_return

    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, num_sequences, width, generator=generator)
    lengths = torch.randint(width // 2, width + 1, (num_sequences, 1), generator=generator)
    mask = (torch.arange(width) < lengths) & (torch.rand(num_sequences, width, generator=generator) > 0.1)
    given = rewards, values, mask.long(), 0.99, 0.95
    ours = partial(compute_gae_advantage_return, *given)
    theirs = partial(verl_on_cpu.untouched(core_algos).compute_gae_advantage_return, *given)

    def gate():
        for got, want in zip(ours(), theirs(), strict=True):
            torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-5)

    num_bytes = (4 + 4 + 8 + 4 + 4) * mask.numel()  # rewards, values, an int64 mask, and two results
    return Case({"qrm_fast": ours, VERL: theirs}, gate=gate, baseline=copy(num_bytes, device), bytes=num_bytes)


@case(cpu=[{"vocab": 32768, "dim": 256, "layers": 6}] if INSTALLED else [])
def verl_update(device: torch.device, vocab: int, dim: int, layers: int) -> Case:
    """Forward and backward pass of verl's FSDP engine: PPO with entropy on 4 answers, float32, a random Qwen2."""
    verl_on_cpu = on_cpu()
    from transformers import Qwen2ForCausalLM
    from verl.utils.experimental import torch_functional
    from verl.workers.config import PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    import qrm_fast.integrations.verl.head  # noqa: F401  the plugin

    prompts, responses = [100] * 4, [40, 80, 120, 160]
    head, plain = torch_functional.FusedLinearForPPO, Qwen2ForCausalLM.forward
    ours, theirs = head.forward, verl_on_cpu.untouched(torch_functional).FusedLinearForPPO.forward
    folder = tempfile.TemporaryDirectory()
    model = verl_on_cpu.write_model(Path(folder.name), vocab=vocab, dim=dim, layers=layers)

    def way(fused: str | None, forward, loss_mode: str, vendor: str = "") -> Provider:
        os.environ["VERL_ENGINE_VENDOR"] = vendor
        Qwen2ForCausalLM.forward = plain
        engine = verl_on_cpu.engine(model, fused=fused)
        of_verl = Qwen2ForCausalLM.forward  # which verl replaces in the class, for all its models
        data = verl_on_cpu.mini_batch(prompts, responses, vocab, fused=fused is not None)
        loss = partial(ppo_loss, config=verl_on_cpu.actor_config(4, policy_loss=PolicyLossConfig(loss_mode=loss_mode)))

        def update() -> list[Tensor]:
            head.forward, Qwen2ForCausalLM.forward = forward, of_verl
            with engine.train_mode(zero_grad_on_exit=False):
                engine.optimizer_zero_grad()
                engine.forward_backward_batch(data.clone(), loss)
            return [p.grad.full_tensor() for p in engine.module.parameters()]

        return update

    ways = {
        "qrm_fast, its engine: response rows": way("torch", ours, "qrm_ppo", "qrm_fast"),
        "qrm_fast, its head": way("torch", ours, "qrm_ppo"),
        f"{VERL}, its fused head": way("torch", theirs, "vanilla"),
        f"{VERL}, logits": way(None, theirs, "vanilla"),
    }

    def gate():
        *got, want = (update() for update in ways.values())
        for grads in got:
            for x, y in zip(grads, want, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())

    rows = torch.randn(sum(responses), dim)
    return Case(
        ways,
        gate=gate,
        baseline=gemm(rows, torch.randn(vocab, dim)),
        num_baselines=4,  # of the head alone
        flops=4 * 2 * sum(responses) * vocab * dim,
    )


@case(cpu=[{"num_answers": 16, "prompt": 8, "width": 256, "num_layers": 6}] if INSTALLED else [])
def verl_loop_update(device: torch.device, num_answers: int, prompt: int, width: int, num_layers: int) -> Case:
    """Forward and backward pass of our loop beside verl's FSDP engine: answers of log-normal length, as end to end."""
    verl_on_cpu = on_cpu()
    from transformers import AutoModelForCausalLM
    from verl.workers.utils.losses import ppo_loss

    from qrm_fast import pack
    from qrm_fast.rl.gated import keep_less
    from qrm_fast.rl.linear import use_onednn
    from qrm_fast.rl.policy import Policy

    lengths = sorted(map(len, drawn(num_answers, prompt).answers))  # as the loop packs them
    folder = tempfile.TemporaryDirectory()
    path = verl_on_cpu.write_model(Path(folder.name), vocab=VOCABULARY, dim=width, layers=num_layers)
    loss = partial(ppo_loss, config=verl_on_cpu.actor_config(num_answers))

    policy = Policy(AutoModelForCausalLM.from_pretrained(path, attn_implementation="qrm_packed").train())
    use_onednn(policy)
    keep_less(policy)
    data = verl_on_cpu.mini_batch([prompt] * num_answers, lengths, VOCABULARY, fused=False)
    batch = pack([row.tolist() for row in data["input_ids"].unbind()], [prompt] * num_answers)
    advantages, old_logprobs = (torch.cat(data[name].unbind()) for name in ("advantages", "old_log_probs"))

    def ours() -> list[Tensor]:
        options = dict(old_logprobs=old_logprobs, temperature=0.9, dual_clip=3.0, entropy_coef=0.01)
        return list(torch.autograd.grad(policy.loss(batch, advantages, **options).loss, list(policy.parameters())))

    os.environ["VERL_ENGINE_VENDOR"] = ""  # no plugin
    engine = verl_on_cpu.engine(path, fused=None)  # logits: its fused head takes longer

    def theirs() -> list[Tensor]:
        with engine.train_mode(zero_grad_on_exit=False):
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(data.clone(), loss)
        return [p.grad.full_tensor() for p in engine.module.parameters()]

    def gate() -> None:
        for x, y in zip(ours(), theirs(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())

    one = 2 * sum(lengths) * VOCABULARY * width  # the logits, once
    num_parameters = sum(p.numel() for p in policy.model.model.layers.parameters())
    flops = 6 * len(batch.input_ids) * num_parameters + 3 * one  # attention's own products left out
    return Case(
        {"qrm_fast, its loop": ours, f"{VERL}, logits": theirs},
        gate=gate,
        baseline=gemm(torch.randn(sum(lengths), width), torch.randn(VOCABULARY, width)),
        num_baselines=flops / one,
        flops=flops,
        repeats=2,
    )
