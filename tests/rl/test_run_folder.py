"""A run's folder is its own; a signal loses nothing; what is not finite is neither stepped on nor saved."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from qrm_fast.rl.arithmetic import arithmetic_demonstration, arithmetic_examples
from qrm_fast.rl.checkpoint import newest_state, save_checkpoint, states
from qrm_fast.rl.config import Config
from qrm_fast.rl.data import Demonstration, Pair, write_jsonl
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.reward_training import QRMConfig, train_q_rm
from qrm_fast.rl.run_folder import RunFolder, RunOptions, Stopped
from qrm_fast.rl.sft import SFTConfig, train_sft
from qrm_fast.rl.tokenizers import load_tokenizer
from qrm_fast.rl.train import train


@dataclass(kw_only=True)
class Options(RunOptions):
    model: str = "m"


def test_a_folder_that_holds_a_run_is_protected(tmp_path):
    options = Options(out=str(tmp_path / "run"))
    with RunFolder(options):
        written = json.loads((tmp_path / "run/options.json").read_text())
        assert written == {"out": options.out, "save_every": 0, "seed": 0, "device": "cpu", "dtype": "float32"} | {
            **{"lora_rank": 0, "lora_alpha": 32.0, "lora_target_modules": "all-linear"},
            "tensorboard": False,
            "model": "m",
        }
        with pytest.raises(ValueError, match="another run is writing to"), RunFolder(options):
            pass
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds a run: resume it, overwrite it, or choose another out"):
        RunFolder(options)
    with RunFolder(replace(options, overwrite=True)):
        pass
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        RunFolder(replace(options, overwrite=True, resume=True))
    for model in (str(tmp_path / "run"), os.path.relpath(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"out must be a directory of its own, got .*, which is also model"):
            RunFolder(replace(options, model=model, overwrite=True))


class Part:
    def __init__(self, x=0.0):
        self.x = torch.tensor(x)

    def state_dict(self):
        return {"x": self.x}

    def load_state_dict(self, state):
        self.x = state["x"]


def test_states_are_kept_when_they_are_due(tmp_path):
    options = Options(out=str(tmp_path), save_every=2)
    with RunFolder(options) as folder:
        for step in range(1, 8):
            folder.keep(step, {"part": Part(float(step))})
    assert len(states(tmp_path)) == 2
    part = Part()
    with RunFolder(replace(options, resume=True)) as folder:
        assert folder.load({"part": part}) == 6
    assert part.x.item() == 6.0
    with (
        pytest.raises(ValueError, match="seed must be that of the state, 0, got 1"),
        RunFolder(replace(options, resume=True, seed=1)) as folder,
    ):
        folder.load({"part": part})
    with RunFolder(replace(options, overwrite=True)):
        assert not states(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_step_and_the_next_one_does_not(tmp_path, number):
    before = signal.getsignal(number)
    with RunFolder(Options(out=str(tmp_path))) as folder:
        folder.keep(1, {"part": Part()})
        assert not states(tmp_path)
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is before  # a second one would end the process
        with pytest.raises(Stopped, match=rf"{number.name} stopped the run after step 2; its state is in .*: go on"):
            folder.keep(2, {"part": Part()})
    assert len(states(tmp_path)) == 1 and signal.getsignal(number) is before


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    examples = arithmetic_examples(24, split="train", seed=0)
    right = {e.instruction: arithmetic_demonstration(e.instruction) for e in examples}
    write_jsonl(folder / "prompts.jsonl", examples)
    write_jsonl(folder / "demonstrations.jsonl", [Demonstration(*item) for item in right.items()])
    write_jsonl(folder / "pairs.jsonl", [Pair(prompt, text, text + "0") for prompt, text in right.items()])
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, folder / "policy")
    return folder


def trainings(data, out):
    scratch = dict(model="scratch:demo", tokenizer="arithmetic", lr=1e-3, batch_size=8)
    yield train_sft, SFTConfig(data=f"{data}/demonstrations.jsonl", out=f"{out}/sft", num_steps=4, **scratch)
    yield train_q_rm, QRMConfig(data=f"{data}/pairs.jsonl", out=f"{out}/q_rm", num_epochs=2, **scratch)
    sizes = dict(num_iterations=4, num_prompts=4, group_size=2, max_new_tokens=4, verifier="arithmetic", lr=1e-3)
    rl = Config(model=f"{data}/policy", data=f"{data}/prompts.jsonl", out=f"{out}/rl", **sizes)
    yield train, replace(rl, reward="random", max_skipped=0)


def weights(directory):
    return (Path(directory) / "model.safetensors").read_bytes()


def stop_after(num_steps, monkeypatch):
    """A signal arrives during the step of this number."""
    step, count = AdamW.step, 0

    def signalled(optimizer, *args):
        nonlocal count
        count += 1
        if count == num_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(optimizer, *args)

    monkeypatch.setattr(AdamW, "step", signalled)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["sft", "train-rm", "train"])
def test_a_stopped_run_goes_on_to_the_same_bits(data, tmp_path, which, monkeypatch):
    run, config = list(trainings(data, tmp_path / "whole"))[which]
    run(config)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(Stopped, match="SIGTERM stopped the run after step 2"):
            run(stopped)
    assert not (tmp_path / "stopped/model.safetensors").exists()
    (tmp_path / "stopped/metrics.jsonl").unlink()  # a lost log does not stop a run that has its state
    run(replace(stopped, resume=True))
    assert weights(stopped.out) == weights(config.out)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["sft", "train-rm", "train"])
def test_a_run_that_diverges_stops_and_saves_nothing(data, tmp_path, which):
    run, config = list(trainings(data, tmp_path))[which]
    with pytest.raises(FloatingPointError, match=r"gradient that is not finite|log-probabilities that are not finite"):
        run(replace(config, lr=1e30))
    assert not (Path(config.out) / "model.safetensors").exists() and not states(Path(config.out))
    for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_state_of_finite_numbers_survives_the_divergence_after_it(data, tmp_path, monkeypatch):
    run, config = next(trainings(data, tmp_path))
    step, count = AdamW.step, 0

    def poisoned(optimizer, *args):
        nonlocal count
        count += 1
        if count == 3:
            optimizer.parameters[0].grad[0, 0] = torch.nan
        return step(optimizer, *args)

    monkeypatch.setattr(AdamW, "step", poisoned)
    with pytest.raises(FloatingPointError, match="step 2 gave a gradient that is not finite"):
        run(replace(config, save_every=1))
    monkeypatch.undo()
    run(replace(config, save_every=1, resume=True))
    run(replace(config, out=str(tmp_path / "whole")))
    assert weights(config.out) == weights(tmp_path / "whole")


def test_sigterm_at_the_command_line_says_how_to_go_on(data, tmp_path):
    command = [sys.executable, "-m", "qrm_fast.cli", "sft", "--data", f"{data}/demonstrations.jsonl"]
    command += ["--model", "scratch:demo", "--tokenizer", "arithmetic", "--num_steps", "100000", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "qrm-fast sft: SIGTERM stopped the run after step" in err and err.count("\n") == 1
    assert states(tmp_path / "run")


def test_a_killed_run_goes_on_and_leaves_no_lock(data, tmp_path):
    """kill -9 leaves a lock file that nobody holds; while the run lives, a second one is refused."""
    command = [sys.executable, "-m", "qrm_fast.cli", "sft", "--data", f"{data}/demonstrations.jsonl"]
    command += ["--model", "scratch:demo", "--tokenizer", "arithmetic", "--num_steps", "100000", "--out", "run"]
    process = subprocess.Popen([*command, "--save_every", "1"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None and not states(tmp_path / "run"):
        time.sleep(0.05)
    options = SFTConfig(data="", out=str(tmp_path / "run"), resume=True)
    try:
        with pytest.raises(ValueError, match="another run is writing to"), RunFolder(options):
            pass
    finally:
        process.kill()
        process.wait()
    with RunFolder(options):
        assert newest_state(tmp_path / "run")[1]["step"] >= 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(max_grad_norm=0.0), "max_grad_norm must be above 0, got 0.0"),
        (dict(max_grad_norm=-1.0), "max_grad_norm must be above 0, got -1.0"),
        (dict(lr=-1e-3), "lr must be at least 0, got -0.001"),
        (dict(lr=float("nan")), "lr must be at least 0, got nan"),
        (dict(decay=2.0), "decay must be from 0 to 1, got 2.0"),
        (dict(save_every=-1), "save_every must be at least 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused_by_every_training(data, tmp_path, options, sentence):
    for run, config in trainings(data, tmp_path):
        with pytest.raises(ValueError, match=sentence):
            run(replace(config, **options))
    assert not list(tmp_path.iterdir())


def test_options_of_one_training(data, tmp_path):
    (sft, sft_config), (rm, rm_config), (rl, rl_config) = trainings(data, tmp_path)
    for run, config, sentence in (
        (sft, replace(sft_config, warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (sft, replace(sft_config, max_tokens=0), "max_tokens must be at least 1, got 0"),
        (rm, replace(rm_config, beta=0.0), "beta must be above 0, got 0.0"),
        (rm, replace(rm_config, heldout=-0.3), "heldout must be from 0 to 1, got -0.3"),
        (rl, replace(rl_config, max_tokens=-1), "max_tokens must be at least 0, got -1"),
        (rl, replace(rl_config, kl_coef=-0.1), "kl_coef must be at least 0, got -0.1"),
        (rl, replace(rl_config, clip_low=1.5), "clip_low must be from 0 to 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(config)


def test_all_pairs_are_trained_on_where_none_is_held_out(data, tmp_path):
    _, (_, config), _ = trainings(data, tmp_path)
    result = train_q_rm(replace(config, heldout=0.0))
    assert (result.num_train, result.num_heldout, result.heldout) == (24, 0, None)


def test_a_billion_minibatches_are_as_many_as_there_are_answers(data, tmp_path):
    *_, (_, config) = trainings(data, tmp_path)
    rows = train(replace(config, num_minibatches=10**9, num_iterations=1, lr=0.0)).metrics
    assert rows[-1]["policy/ratio"] == pytest.approx(1.0, abs=1e-3)
