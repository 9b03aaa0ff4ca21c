"""The host never waits for the device between packing and the one read of an iteration's metrics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "qrm-released": dict(num_epochs=2, num_minibatches=2),  # Q-RM, reference and critic
    "grpo": dict(kl_coef=0.1, importance="truncate-sequence"),
}


def train_without_waiting(checkpoints: str, out: str, preset: str) -> None:
    """Three iterations on CUDA in bfloat16, of which the first may wait, for the Q-RM's scale."""
    from qrm_fast.rl import config, train

    pack_answers, report, iterations = train.pack_answers, train.report, iter(range(3))

    def forbidding(*args):
        torch.cuda.set_sync_debug_mode("error" if next(iterations) else "default")
        return pack_answers(*args)

    def allowing(*args):
        torch.cuda.set_sync_debug_mode("default")
        return report(*args)

    train.pack_answers, train.report = forbidding, allowing
    options = {**config.preset(preset, "ppo"), **OPTIONS[preset]}
    sizes = dict(num_iterations=3, num_prompts=4, group_size=4, max_new_tokens=8, max_tokens=90, lr=1e-3)
    paths = dict(
        model=f"{checkpoints}/policy", q_rm=f"{checkpoints}/q_rm", data=f"{checkpoints}/prompts.jsonl", out=out
    )
    options |= dict(verifier="arithmetic", device="cuda", dtype="bfloat16")
    try:
        rows = train.train(config.Config(**paths, **sizes, **options)).metrics
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(rows) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("preset", OPTIONS)
def test_nothing_waits_for_the_gpu(checkpoints, tmp_path, preset):
    train_without_waiting(str(checkpoints), str(tmp_path / "run"), preset)


@pytest.mark.parametrize("preset", OPTIONS)
def test_nothing_would_wait_for_a_gpu(checkpoints, tmp_path, preset):
    """The same with a device that is none."""
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "tests/rl", ROOT)))
    call = f"test_waiting.train_without_waiting({str(checkpoints)!r}, {str(tmp_path / 'run')!r}, {preset!r})"
    command = [sys.executable, "-c", f"import rehearsal, test_waiting; {call}"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
