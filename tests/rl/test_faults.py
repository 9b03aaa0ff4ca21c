"""What goes wrong in a run: processes killed, a full disk, engines that say little, gradients that are not finite."""

import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from qrm_fast.rl import checkpoint
from qrm_fast.rl import train as loop
from qrm_fast.rl.checkpoint import newest_state, states
from qrm_fast.rl.config import Config, preset
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.rollout import Rollout, TransformersEngine
from qrm_fast.rl.train import train

# One process imports everything, and those that are to be killed are forks of it.
context = get_context("forkserver")
context.set_forkserver_preload(["qrm_fast.rl.train", "pytest"])
NUM_THREADS = 1


@pytest.fixture(scope="module")
def config(checkpoints, tmp_path_factory):
    return Config(
        **{**preset("qrm-released"), "reward": "random"},
        model=str(checkpoints / "policy"),
        q_rm=str(checkpoints / "q_rm"),
        prm=str(checkpoints / "prm"),
        orm=str(checkpoints / "q_rm"),
        data=str(checkpoints / "prompts.jsonl"),
        out=str(tmp_path_factory.mktemp("faults") / "whole"),
        verifier="arithmetic",
        num_iterations=4,
        num_prompts=4,
        group_size=2,
        max_new_tokens=6,
        lr=1e-3,
        save_every=1,
    )


@pytest.fixture(scope="module")
def whole(config):
    """The run that nothing happened to."""
    return train(config)


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The same number everywhere: the bits of a weight's gradient depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before)


def weights(directory):
    return (Path(directory) / "model.safetensors").read_bytes()


def untimed(rows):
    return [{key: x for key, x in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]


def goes_on(config, whole):
    result = train(replace(config, resume=True))
    assert weights(config.out) == weights(whole.directory)
    assert untimed(result.metrics) == untimed(whole.metrics)


def at_call(number, function, instead):
    """`function`, whose call of that number is `instead`, which gets the function and the arguments."""
    calls = 0

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        return instead(function, *args, **options) if calls == number else function(*args, **options)

    return counted


def killed(function, *args, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(function, *args, **options):
    function(*args, **options)
    killed(function)


def killed_half_written(save, parts, checkpoint_id):
    save(parts, checkpoint_id=checkpoint_id)
    os.truncate(checkpoint_id / "__0_0.distcp", 1000)
    (checkpoint_id / ".metadata").unlink()
    killed(save)


remove = shutil.rmtree


def killed_half_removed(path, **options):
    if Path(path).name == "state.old" and Path(path).exists():
        (Path(path) / "__0_0.distcp").unlink()
        killed(remove)
    remove(path, **options)


MOMENTS = {
    "in a step": lambda: (AdamW, "step", at_call(3, AdamW.step, killed)),
    "after a step": lambda: (AdamW, "step", at_call(3, AdamW.step, killed_after)),
    "while a state is written": lambda: (dcp, "save", at_call(3, dcp.save, killed_half_written)),
    "before a state has its name": lambda: (checkpoint, "_replace", at_call(2, checkpoint._replace, killed)),
    "while an old state is removed": lambda: (shutil, "rmtree", killed_half_removed),
    "while the model is saved": lambda: (loop, "save_checkpoint", at_call(1, loop.save_checkpoint, killed)),
}


def run_to(moment, config):
    torch.set_num_threads(NUM_THREADS)
    setattr(*MOMENTS[moment]())
    train(config)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(config, whole, tmp_path, moment):
    config = replace(config, out=str(tmp_path / "run"))
    process = context.Process(target=run_to, args=(moment, config))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run/model.safetensors").exists()
    goes_on(config, whole)
    assert sorted(path.name for path in tmp_path.glob("run/state*")) == ["state-00000003", "state-00000004"]


def test_twenty_steps_after_a_kill_are_those_of_the_run_that_was_not_killed(config, tmp_path):
    """PPO, whose critic and whose scale are remembered, too; killed between the steps of policy and critic."""
    config = replace(config, **preset("qrm-released", "ppo"), num_iterations=21, eval_data=config.data)
    whole = train(replace(config, out=str(tmp_path / "whole")))
    config = replace(config, out=str(tmp_path / "run"))
    process = context.Process(target=run_to, args=("after a step", config))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert newest_state(tmp_path / "run")[1]["step"] == 1
    goes_on(config, whole)
    assert [row["step"] for row in whole.metrics] == list(range(22))


def test_a_full_disk_ends_a_run_that_has_its_older_state(config, whole, tmp_path, monkeypatch):
    """Files may not grow beyond some bytes from the second state on."""
    config = replace(config, out=str(tmp_path / "run"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(save, *args, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        save(*args, **options)

    monkeypatch.setattr(dcp, "save", at_call(2, dcp.save, fill))
    try:
        with pytest.raises(OSError, match=r"the state of step 2 could not be written to .*; kept: state-00000001"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("run/state*")] == ["state-00000001"]
    goes_on(config, whole)


def poisoned(optimizer_step, optimizer, *args):
    optimizer.parameters[0].grad.view(-1)[0] = torch.nan
    return optimizer_step(optimizer, *args)


def test_a_step_that_is_not_finite_is_skipped_and_counted(config, tmp_path, monkeypatch):
    config = replace(config, out=str(tmp_path / "run"), max_skipped=1)
    monkeypatch.setattr(AdamW, "step", at_call(4, at_call(2, AdamW.step, poisoned), poisoned))
    rows = train(config).metrics  # two of them, and not in a row
    assert [row["policy/skipped"] for row in rows] == [0, 1, 0, 1]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["policy/grad_norm"] is None and json.loads(lines[2])["policy/grad_norm"] > 0


def test_too_many_steps_in_a_row_end_the_run_and_its_last_good_state_is_kept(config, whole, tmp_path, monkeypatch):
    config = replace(config, out=str(tmp_path / "run"), max_skipped=1)
    step = at_call(3, at_call(2, AdamW.step, poisoned), poisoned)
    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(FloatingPointError, match=r"iteration 3 gave a gradient .*: 2 steps in a row are skipped, more"):
        train(config)
    monkeypatch.undo()
    assert not (tmp_path / "run/model.safetensors").exists()
    assert newest_state(tmp_path / "run")[1]["step"] == 2
    shutil.rmtree(states(tmp_path / "run")[0])  # what came before the first skipped step
    goes_on(config, whole)


def test_a_critic_whose_gradient_is_not_finite_is_counted(config, tmp_path, monkeypatch):
    config = replace(config, **preset("qrm-released", "ppo"), out=str(tmp_path / "run"), num_iterations=2)
    monkeypatch.setattr(AdamW, "step", at_call(2, AdamW.step, poisoned))  # the policy's, then the critic's
    rows = train(config).metrics
    assert [row["policy/skipped"] for row in rows] == [1, 0]
    assert rows[0]["policy/grad_norm"] > 0 and rows[1]["critic/grad_norm"] > 0


EOS, DIGIT = 1, 4
SAID = {
    "only EOS": [[EOS]],
    "no EOS": [[DIGIT] * 6],
    "some nothing": [[], [DIGIT, EOS], [EOS], [DIGIT] * 6, []],
}


def saying(answers):
    """An engine that gives these answers, again and again."""

    class Engine(TransformersEngine):
        def generate(self, prompts, *, num_samples, **options):
            responses = [answers[i % len(answers)] for i in range(len(prompts) * num_samples)]
            logprobs = [torch.full((len(response),), -2.5) for response in responses]
            return Rollout(responses, logprobs, [response[-1:] == [EOS] for response in responses])

    return Engine


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("reward", ["qrm-paper", "pure-verl", "pure-openrlhf", "rloo", "orm"])
def test_an_engine_that_says_little(config, tmp_path, monkeypatch, name, reward):
    monkeypatch.setattr(loop, "check_sampling", lambda *_: None)
    monkeypatch.setattr(loop, "TransformersEngine", saying(SAID[name]))
    config = replace(config, **preset(reward, "ppo"), out=str(tmp_path / "run"), num_iterations=2, max_tokens=24)
    rows = train(config).metrics
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
    assert rows[0]["policy/skipped"] == 0


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ([[]], "the engine must give some answer a token, got 8 empty ones"),
        ([[DIGIT] * 7], "the engine must give at most 6 tokens and a log-probability of each, got 7 tokens and"),
    ],
)
def test_an_engine_that_does_not_do_as_asked(config, tmp_path, monkeypatch, answers, sentence):
    monkeypatch.setattr(loop, "check_sampling", lambda *_: None)
    monkeypatch.setattr(loop, "TransformersEngine", saying(answers))
    with pytest.raises(ValueError, match=sentence):
        train(replace(config, out=str(tmp_path / "run")))
