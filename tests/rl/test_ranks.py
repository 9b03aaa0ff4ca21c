"""Several processes train as one does: its numbers, its states at any number of processes, its end when one dies."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist

from qrm_fast import pack
from qrm_fast.rl import ranks
from qrm_fast.rl import train as loop
from qrm_fast.rl.checkpoint import newest_state, states
from qrm_fast.rl.config import Config, preset
from qrm_fast.rl.optimizer import AdamW
from qrm_fast.rl.rollout import Rollout, TransformersEngine
from qrm_fast.rl.run_folder import Stopped

# One process imports everything, and those that train together are forks of it.
context = get_context("forkserver")
context.set_forkserver_preload(["qrm_fast.rl.train", "pytest"])
EOS = 1


class GivenAnswers(TransformersEngine):
    """Answers that depend on nothing but their prompt and their number, and not on which process gives them."""

    asked = False

    def generate(self, prompts, *, num_samples, max_new_tokens, temperature, seed):
        first, self.asked = not self.asked, True
        if temperature == 0 or first:  # the first is the check at the start
            options = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            return super().generate(prompts, num_samples=num_samples, **options)
        responses, logprobs = [], []
        for prompt in prompts:
            for number in range(num_samples):
                draw = Random(zlib.crc32(repr((prompt, number)).encode()))
                response = [draw.randrange(2, 17) for _ in range(draw.randrange(1, max_new_tokens))] + [EOS]
                with torch.no_grad():
                    logprobs.append(self.policy(pack([prompt + response], [len(prompt)])).logprobs)
                responses.append(response)
        return Rollout(responses, logprobs, [True] * len(responses))


def run(rank, environment, config):
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    loop.TransformersEngine = GivenAnswers
    loop.train(config)
    ranks.disconnect()


def run_with_a_signal(rank, environment, config):
    """The second process gets SIGTERM in its first step."""
    step = AdamW.step

    def signalled(optimizer, *args):
        AdamW.step = step
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(optimizer, *args)

    AdamW.step = signalled
    with pytest.raises(Stopped, match="SIGTERM stopped the run after step 1; its state is in"):
        run(rank, environment, config)


def train_together(num_processes, config, run=run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(WORLD_SIZE=str(num_processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = [context.Process(target=run, args=(rank, environment, config)) for rank in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * num_processes


@pytest.fixture(scope="module")
def config(checkpoints, tmp_path_factory):
    """PPO with critic, reference, Q-RM, PRM and verifier; micro-batches that some process has fewer of."""
    return Config(
        **{**preset("qrm-released", "ppo"), "reward": "q-rm=1.0,pure=0.5,verifier=2.0", "process": "verl"},
        model=str(checkpoints / "policy"),
        q_rm=str(checkpoints / "q_rm"),
        prm=str(checkpoints / "prm"),
        data=str(checkpoints / "prompts.jsonl"),
        eval_data=str(checkpoints / "prompts.jsonl"),
        out=str(tmp_path_factory.mktemp("ranks") / "run"),
        verifier="arithmetic",
        num_iterations=3,
        num_prompts=5,
        group_size=2,
        max_new_tokens=10,
        num_epochs=2,
        max_tokens=40,
        lr=1e-4,
        save_every=2,
    )


# Not means over answers: of several processes the mean of theirs, counted by their answers.
OF_STEPS_AND_TOKENS = ("reward/step_mean", "process/one_step_mass", "process/short_mass")


def rows_of(config):
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]


def weights(config):
    return (Path(config.out) / "model.safetensors").read_bytes()


def train_alone(config):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "TransformersEngine", GivenAnswers)
        loop.train(config)


@pytest.fixture(scope="module")
def alone(config):
    """The same training in one process."""
    config = replace(config, out=config.out + "1")
    train_alone(config)
    return config


@pytest.fixture(scope="module")
def pair(config):
    config = replace(config, out=config.out + "2")
    train_together(2, config)
    return config


def assert_same_numbers(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        exact = {key: x for key, x in theirs.items() if key not in OF_STEPS_AND_TOKENS}
        assert {key: ours[key] for key in exact} == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_a_group_of_one_process_is_left_to_whoever_made_it(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    ranks.disconnect()
    assert dist.is_initialized()
    dist.destroy_process_group()


def test_two_processes_have_the_numbers_of_one(alone, pair):
    assert_same_numbers(rows_of(pair), rows_of(alone))


@pytest.mark.parametrize("options", [
    preset("prime") | dict(num_prompts=3, top_entropy=0.5, overlong_tokens=4),
    {**preset("rloo"), "num_minibatches": 3, "num_prompts": 2, "importance": "mask-sequence", "dtype": "bfloat16"},
])  # fmt: skip
def test_other_streams_and_options_run_together(config, tmp_path, options):
    config = replace(config, **options, out=str(tmp_path / "run"), num_iterations=2)
    train_together(2, config)
    rows = rows_of(config)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["policy/skipped"] == 0
    if config.implicit_lr:
        train_alone(replace(config, out=str(tmp_path / "alone")))
        assert_same_numbers(rows, rows_of(replace(config, out=str(tmp_path / "alone"))))


def resumed(config, name):
    """`config` in a copy of its folder, from the state after two of three iterations."""
    other = replace(config, out=config.out + name, resume=True)
    shutil.copytree(config.out, other.out)
    (Path(other.out) / "model.safetensors").unlink()
    return other


def test_two_processes_resume_to_the_same_bits(pair):
    other = resumed(pair, "again")
    train_together(2, other)
    assert rows_of(other) == rows_of(pair) and weights(other) == weights(pair)


def test_four_processes_take_up_what_two_began(pair, alone):
    other = resumed(pair, "four")
    train_together(4, other)
    assert_same_numbers(rows_of(other), rows_of(alone))


def test_one_process_takes_up_what_two_began(pair, alone):
    other = resumed(pair, "one")
    train_alone(other)
    assert_same_numbers(rows_of(other), rows_of(alone))


def test_a_signal_to_one_process_stops_all_after_the_same_step(config):
    config = replace(config, out=config.out + "stopped", save_every=0)
    train_together(2, config, run_with_a_signal)
    assert [path.name for path in states(Path(config.out))] == ["state-00000001"]


def test_a_dead_process_ends_torchrun_and_the_run_goes_on(config, tmp_path):
    config = replace(config, **{**preset("qrm-released"), "reward": "random"}, q_rm=None, prm=None)
    config = replace(config, out=str(tmp_path / "run"), eval_data=None, num_epochs=1, num_iterations=10000)
    (tmp_path / "config.json").write_text(json.dumps(asdict(replace(config, save_every=1))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "qrm_fast.cli", "train", "--config", str(tmp_path / "config.json")]
    options = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, start_new_session=True, **options) as torchrun:
        while torchrun.poll() is None and not states(tmp_path / "run"):
            time.sleep(0.05)
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
        _, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode == 1 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert "qrm-fast train: error: another process of this run has ended: go on with resume" in err
    _, about = newest_state(tmp_path / "run")
    rows = loop.train(replace(config, save_every=1, resume=True, num_iterations=about["step"] + 1)).metrics
    assert [row["step"] for row in rows] == list(range(1, about["step"] + 2))
