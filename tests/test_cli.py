"""Every command from its arguments to its files, and what a user reads when an input is wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from random import Random
from threading import Event
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from qrm_fast import cli
from qrm_fast.cli import COMMANDS, main
from qrm_fast.rl.arithmetic import arithmetic_demonstration, arithmetic_examples
from qrm_fast.rl.checkpoint import save_checkpoint, states
from qrm_fast.rl.config import Config
from qrm_fast.rl.data import STEP, Demonstration, Judged, Pair, Solution, write_jsonl
from qrm_fast.rl.metrics import MetricsLog
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Fresh models of the arithmetic vocabulary, and one file of every kind."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, folder / "policy")
    save_checkpoint(load_token_model("scratch:demo", tokenizer), tokenizer, folder / "q_rm")
    examples = arithmetic_examples(16, split="train", seed=0)
    right = {e.instruction: arithmetic_demonstration(e.instruction) for e in examples}
    slips = Random(0)
    wrong = {prompt: arithmetic_demonstration(prompt, slips) + "0" for prompt in right}
    write_jsonl(folder / "prompts.jsonl", examples)
    write_jsonl(folder / "demonstrations.jsonl", [Demonstration(*item) for item in right.items()])
    judged = [Judged(prompt, answer, answer is right[prompt]) for x in (right, wrong) for prompt, answer in x.items()]
    write_jsonl(folder / "judged.jsonl", judged)
    steps = [(prompt, answer.split(STEP)) for prompt, answer in right.items()]
    solutions = [Solution(p, (*s[:-1], "0"), (*[True] * (len(s) - 1), False)) for p, s in steps]
    write_jsonl(folder / "solutions.jsonl", solutions)
    write_jsonl(folder / "pairs.jsonl", [Pair(prompt, right[prompt], wrong[prompt]) for prompt in right])
    return folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty directory; gives back its exit status, output and error text."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


TRAIN = ["--num_iterations", 2, "--num_prompts", 4, "--group_size", 2, "--max_new_tokens", 6, "--lr", 1e-3]


def train_arguments(inputs):
    arguments = ["train", "--model", inputs / "policy", "--q_rm", inputs / "q_rm", "--data", inputs / "prompts.jsonl"]
    return [*arguments, "--verifier", "arithmetic", *TRAIN]


def rows_of(directory):
    return [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]


# ---- commands


def test_sft_then_eval(inputs, run):
    arguments = ["--model", "scratch:demo", "--tokenizer", "arithmetic", "--num_steps", 2, "--batch_size", 4]
    status, out, err = run("sft", "--data", inputs / "demonstrations.jsonl", *arguments)
    assert (status, err) == (0, "")
    assert "tokens/s" in out and "policy  runs/sft" in out
    model = AutoModelForCausalLM.from_pretrained("runs/sft")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained("runs/sft"))
    assert [row["step"] for row in rows_of("runs/sft")] == [0, 1]

    arguments = ["--verifier", "arithmetic", "--max_new_tokens", 4]
    status, out, err = run("eval", "--model", "runs/sft", "--data", inputs / "prompts.jsonl", *arguments)
    assert (status, err) == (0, "")
    assert "Pass@1 on 16 problems" in out and ["greedy", "0.000", "±", "0.000"] in map(str.split, out.splitlines())


def test_train_rm_saves_what_plain_transformers_loads(inputs, run):
    arguments = ["--model", "scratch:demo", "--tokenizer", "arithmetic", "--batch_size", 4, "--out", "q"]
    status, out, err = run("train-rm", "--data", inputs / "pairs.jsonl", *arguments)
    assert (status, err) == (0, "")
    assert "14 pairs trained on" in out and "2 pairs held out" in out and "tokens/s" in out and "Q-RM  q" in out
    model = AutoModelForTokenClassification.from_pretrained("q")
    assert model.config.num_labels == 1 and model.score.weight.shape == (1, 128)
    options = json.loads(Path("q/options.json").read_text())
    assert options["batch_size"] == 4
    # what starts from nothing has defaults of its own, what is trained further has the library's
    assert {key: options[key] for key in cli.FROM_SCRATCH if key != "batch_size"} == {
        key: value for key, value in cli.FROM_SCRATCH.items() if key != "batch_size"
    }
    assert len(rows_of("q")) == 4 * cli.FROM_SCRATCH["num_epochs"] + 1
    status, out, err = run(
        "train-rm", "--data", inputs / "pairs.jsonl", "--model", inputs / "policy", "--out", "further"
    )
    assert (status, err) == (0, "")
    assert json.loads(Path("further/options.json").read_text())["lr"] == 1e-5


def test_a_prm_from_solutions_to_scores_and_a_policy(inputs, run):
    arguments = ["--kind", "prm", "--model", "scratch:demo", "--tokenizer", "arithmetic", "--separator", STEP]
    arguments += ["--batch_size", 8, "--num_epochs", 1, "--out", "prm"]
    status, out, err = run("train-rm", "--data", inputs / "solutions.jsonl", *arguments)
    assert (status, err) == (0, "")
    assert "14 solutions trained on" in out and "2 solutions held out" in out and "PRM  prm" in out
    assert Path("prm/calibration.png").read_bytes().startswith(b"\x89PNG")
    options = json.loads(Path("prm/options.json").read_text())
    assert (options["kind"], options["separator"], options["num_head_epochs"]) == ("prm", STEP, 0)
    assert AutoModelForTokenClassification.from_pretrained("prm").config.num_labels == 2
    status, out, err = run("train-rm", "--config", "prm/options.json", "--out", "again")
    assert (status, err) == (0, "") and rows_of("again")[0]["prm/loss"] == rows_of("prm")[0]["prm/loss"]

    response = "07+6=13\n\n#13"
    status, out, err = run("score", "--model", "prm", "--prompt", "7+6:", "--response", response)
    assert (status, err) == (0, "")
    table = cells(out)
    assert [row[1] for row in table] == ["'07+6=13'", "'#13'"] and all(-1 <= float(row[2]) <= 1 for row in table)
    assert abs(sum(float(row[3]) for row in table) - 1) < 2e-3
    status, out, err = run("score", "--model", "prm", "--prompt", "7+6:", "--response", response, "--plot", "x.png")
    assert (status, out) == (2, "") and "plot draws the tokens of a Q-RM" in err

    chosen = ["--best_of", 3, "--rerank", "prm", "--reward_model", "prm", "--plot", "best.png", "--early_reject", 2]
    arguments = ["--data", inputs / "prompts.jsonl", "--verifier", "arithmetic", "--max_new_tokens", 4, *chosen]
    status, out, err = run("eval", "--model", inputs / "policy", *arguments)
    assert (status, err) == (0, "") and "Best of k on 16 problems, chosen by prm" in out
    assert [row[:2] for row in cells(out)] == [[k, "0.000"] for k in "123"]
    assert "half dropped after 2 tokens" in out
    assert Path("best.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = run("eval", "--model", inputs / "policy", *arguments, "--best_of", 0)
    assert status == 2 and "best_of must be at least 1, got 0" in err
    for option in (["--rerank", "prm", "--reward_model", "prm"], ["--plot", "x.png"]):
        status, _, err = run("eval", "--model", inputs / "policy", *arguments[:6], *option)
        assert status == 2 and f"{option[-2][2:]} needs best_of above 1: of one answer there is no choice" in err

    arguments = [*train_arguments(inputs), "--preset", "pure-paper", "--algorithm", "ppo", "--prm", "prm"]
    status, out, err = run(*arguments, "--reward", "pure=1.0,verifier=1.0", "--labelled_share", 0.1)
    assert (status, err) == (0, "") and "process/short_mass" in rows_of("runs/train")[1]
    assert run("plot", ".")[0] == 0


@pytest.mark.parametrize("kind", ["orm", "qrm-vocab", "dpo", "implicit"])
def test_the_other_kinds_train_and_serve_a_policy(inputs, run, kind):
    data = "judged" if kind == "implicit" else "pairs"
    model = ["--model", inputs / "policy", "--batch_size", 4, "--lr", 1e-3, "--out", "rm"]
    status, out, err = run("train-rm", "--kind", kind, "--data", inputs / f"{data}.jsonl", *model)
    assert (status, err) == (0, "") and "trained on" in out and "held out" in out and "tokens/s" in out
    assert json.loads(Path("rm/options.json").read_text())["kind"] == kind
    if kind in ("orm", "qrm-vocab"):
        status, out, err = run("score", "--model", "rm", "--prompt", "1+1:", "--response", "01+1=02")
        assert (status, err) == (0, "") and len(cells(out)) == 8
    preset = {"dpo": "dpo-rm", "implicit": "dpo-rm"}.get(kind, kind)
    field = {"dpo": "implicit", "qrm-vocab": "q_rm"}.get(kind, kind)
    for algorithm in "reinforce", "ppo":
        arguments = ["--preset", preset, "--algorithm", algorithm, f"--{field}", "rm", "--out", algorithm]
        status, out, err = run(*train_arguments(inputs), *arguments)
        assert (status, err) == (0, "") and rows_of(algorithm)[0]["policy/grad_norm"] > 0
    if kind in ("dpo", "implicit"):
        status, _, err = run(
            "train-rm", "--kind", kind, "--data", inputs / f"{data}.jsonl", "--tokenizer", "arithmetic"
        )
        assert status == 2 and "the following arguments are required: model" in err


def test_train_from_a_file_an_override_and_the_options_it_left(inputs, run):
    model, q_rm, data = (json.dumps(str(inputs / name)) for name in ("policy", "q_rm", "prompts.jsonl"))
    Path("run.yaml").write_text(
        f"model: {model}\nq_rm: {q_rm}\ndata: {data}\nverifier: arithmetic\npreset: qrm-paper\nnum_iterations: 5\n"
        "num_prompts: 4\ngroup_size: 2\nmax_new_tokens: 6\nlr: 1e-3\n"
    )
    evaluation = ["--eval_data", inputs / "prompts.jsonl", "--tensorboard"]
    status, out, err = run("train", "--config", "run.yaml", "--num_iterations", 2, *evaluation)
    assert (status, err) == (0, "")
    assert "Pass@1" in out and "before" in out and "rollout" in out and "policy  runs/train" in out
    options = json.loads(Path("runs/train/options.json").read_text())
    assert {**asdict(Config(**options)), **options} == asdict(Config(**options))
    assert (options["num_iterations"], options["center"], options["lr"]) == (2, True, 1e-3)
    assert options["tensorboard"] and list(Path("runs/train").glob("events.*"))
    rows = rows_of("runs/train")
    assert [row["step"] for row in rows] == [0, 1, 2]

    status, out, err = run("train", "--config", "runs/train/options.json", "--out", "again", "--tensorboard", "false")
    assert (status, err) == (0, "")
    for row, again in zip(rows, rows_of("again"), strict=True):
        assert {k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} == {
            k: v for k, v in again.items() if not k.startswith(("time/", "perf/"))
        }

    status, out, err = run("plot", ".")
    assert (status, err, out) == (0, "", "curves  ./curves.png\n")
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")


def cells(out):
    """The rows of a printed table that begin with a position, split at runs of blanks."""
    return [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()]


def test_score_prints_q_and_the_difference_up_to_the_first_different_token(inputs, run):
    prompt, responses = "7+6:", ["07+6=13", "07+6=03"]
    both = [argument for response in responses for argument in ("--response", response)]
    status, out, err = run("score", "--model", inputs / "q_rm", "--prompt", prompt, *both, "--plot", "q.png")
    assert (status, err) == (0, "")
    assert Path("q.png").read_bytes().startswith(b"\x89PNG")

    tokenizer = AutoTokenizer.from_pretrained(inputs / "q_rm")
    model = AutoModelForTokenClassification.from_pretrained(inputs / "q_rm").double().eval()
    ids = [[*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id] for response in responses]
    with torch.no_grad():
        q = model(torch.tensor(ids), use_cache=False).logits[:, len(prompt) :, 0]  # [2, T]
    normalized = (q - q.mean()) / q.std(correction=0)
    table = cells(out)
    assert len(table) == q.shape[1] == 8
    for t, row in enumerate(table):
        assert int(row[0]) == t
        assert [row[1], row[4]] == [repr([*response, "<eos>"][t]) for response in responses]
        for i, (column, expected) in enumerate(((2, q[0]), (5, q[1]))):
            assert abs(float(row[column]) - expected[t]) < 1e-4
            assert abs(float(row[column + 1]) - normalized[i, t]) < 1e-2
        assert len(row) == (8 if t <= 5 else 7)
        if t <= 5:  # "1" against "0" is the sixth token; before it, both answers are one text
            assert abs(float(row[7]) - (q[0, t] - q[1, t] if t == 5 else 0)) < 1e-4

    status, out, err = run("score", "--model", inputs / "q_rm", "--prompt", prompt, "--response", responses[0])
    assert (status, err) == (0, "")
    assert [row[:3] for row in cells(out)] == [row[:3] for row in table]


def test_score_shows_brackets_and_blanks_as_they_are(run, tmp_path):
    tokenizer = load_tokenizer("bpe", ["a [b] c"])
    save_checkpoint(load_token_model("scratch:demo", tokenizer), tokenizer, tmp_path / "q_rm")
    status, out, err = run("score", "--model", "q_rm", "--prompt", "a", "--response", "[b]\n c", "--response", "[b]")
    assert (status, err) == (0, "")
    assert [row[1] for row in cells(out)] == ["'['", "'b'", "']'", "'\\n'", "'", "'<eos>'"]


def test_demo_draws_what_the_library_returns(run, monkeypatch):
    calls = []
    right = (["1", "2", "<eos>"], [0.0, 1.0, 0.0])
    wrong = (["1", "3", "<eos>"], [0.0, -1.0, 0.0])

    def library(*arguments):
        calls.append(arguments)
        MetricsLog(f"{arguments[-1]}/seed0/policy")(0, {"eval/pass@1_sampled": 0.5})
        located = SimpleNamespace(prompt="1+1:", right=right, wrong=wrong) if len(arguments) == 3 else None
        return SimpleNamespace(located=located, summary="three lines")

    monkeypatch.setitem(sys.modules, "qrm_fast.rl.demo", SimpleNamespace(demo=library, process_demo=library))
    for arguments, folder, figures in (
        ([], "runs/demo", ("curves", "heat_map")),
        (["--method", "pure"], "runs/demo_pure", ("curves", "forms")),
    ):
        status, out, err = run("demo", *arguments)
        assert (status, err) == (0, "")
        assert out.endswith("three lines\n")
        for name in figures:
            assert f"{folder}/{name}.png" in out
            assert Path(f"{folder}/{name}.png").read_bytes().startswith(b"\x89PNG")
    run("demo", "--seeds", 3, "--controls", "--out", "three")
    assert calls == [(1, False, "runs/demo"), (1, "runs/demo_pure"), (3, True, "three")]


def test_doctor_names_the_file_of_every_op(run):
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    assert "csrc/cpu/token_q.cpp" in out


def test_plan_estimates_an_iteration(run):
    status, out, err = run("plan", "--model-shape", "7b", "--gpus", 8)
    assert (status, err) == (0, "")
    assert run("plan", "--model_shape=7b", "--gpus=8", "--nodes=1") == (0, out, "")  # a dash or not
    for row in ("rollout     score    update     step", "products", "activations", "in all"):
        assert row in out
    assert "data sheet of H200" in out and "not measured" in out and "of the step: heads and losses" in out
    fewer = run("plan", "--model-shape", "7b", "--gpus", 8, "--scorers", 0)[1]
    assert "score" not in fewer
    status, out, err = run("plan", "--model-shape", "9b", "--gpus", 8)
    assert (status, out) == (2, "") and err.startswith("qrm-fast plan: error: model_shape must be one of 0.5b, 1.5b")


def test_a_terminal_sees_the_newest_row(tmp_path, monkeypatch):
    terminal, seen = StringIO(), Event()
    monkeypatch.setattr(cli, "Console", lambda: Console(file=terminal, force_terminal=True, width=200))
    in_short = cli._in_short

    def watched(directory, row):
        text = in_short(directory, row)
        if "sft/loss 0.25" in text:
            seen.set()
        return text

    monkeypatch.setattr(cli, "_in_short", watched)
    with cli._newest_row_shown(tmp_path):
        log = MetricsLog(tmp_path / "sft")
        log(0, {"sft/loss": 0.5})
        log(1, {"sft/loss": 0.25, "time/update_s": 1.0})
        assert seen.wait(30)
    assert in_short(Path("sft"), {"step": 1, "sft/loss": 0.25, "time/update_s": 1.0}) == "sft: step 1  sft/loss 0.25"
    row = {"step": 3, "policy/loss": None, "perf/update_tokens_per_s": 12345.6, "perf/update_mfu": 0.314}
    assert in_short(Path("rl"), row) == "rl: step 3  update 12,346 tokens/s  MFU 31.4%"


# ---- help


def test_help_lists_the_commands_and_their_options(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in out
        with pytest.raises(SystemExit) as exit:
            main([name, "--help"])
        assert exit.value.code == 0
        assert f"usage: qrm-fast {name}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "Answers sampled to each prompt." in " ".join(capsys.readouterr().out.split())
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("qrm-fast ")


# ---- bad input: one line, exit status 2, and nothing left behind


TRAIN_MD = ["train", "--model", "m", "--data", "d"]
SCORE_MP = ["score", "--model", "./no", "--prompt", "p", "--response", "r"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["learn"],
            "error: command must be one of demo, sft, train-rm, train, eval, score, merge, plot, lab, plan, doctor, "
            "got learn",
        ),
        (["sft"], "qrm-fast sft: error: the following arguments are required: data"),
        (["demo", "--seeds", "many"], "seeds must be int, got many"),
        (["demo", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["demo", "--seeds", "-1"], "seeds must be at least 1, got -1"),
        (["demo", "--method", "pure", "--controls"], "controls are those of the method qrm, expected none with pure"),
        (["train-rm", "--data", "d", "--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
        (["train-rm", "--data", "d", "--num_ep", "1"], "unrecognized arguments: --num_ep 1"),
        (["train-rm", "--data", "d", "--lr", "fast"], "lr must be float, got fast"),
        (
            [*TRAIN_MD, "--reward", "fame"],
            "reward must be one of q-rm, qrm-vocab, orm, implicit, random, pure, verifier, or a mixture such as pure=",
        ),
        (
            [*TRAIN_MD, "--preset", "ppo"],
            "preset must be one of qrm-released, qrm-paper, qrm-vocab, orm, dpo-rm, pure-p",
        ),
        (
            ["train-rm", "--data", "d", "--kind", "fame"],
            "kind must be one of qrm, qrm-vocab, orm, prm, dpo, implicit, got fa",
        ),
        ([*TRAIN_MD, "--config", "no.yaml"], "no.yaml"),
        ([*TRAIN_MD, "--device", "toaster"], "device must be one that torch can use here, got toaster"),
        (
            [*TRAIN_MD, "--dtype", "float31"],
            "dtype must be one of 'float32', 'bfloat16', got float31",
        ),
        (["train-rm", "--data", "no.jsonl", "--tokenizer", "bpe"], "No such file or directory: 'no.jsonl'"),
        (["plot", "no"], "expected a metrics.jsonl in no or below it, found none"),
        ([*SCORE_MP, "--response", "r", "--response", "r"], "response must be given once or twice, got 3"),
        (SCORE_MP, "./no"),
    ],
)
def test_wrong_arguments(run, tmp_path, arguments, sentence):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert sentence in err and err.startswith("qrm-fast") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_configuration_that_would_run_is_printed(tmp_path, capsys, monkeypatch):
    """With the preset's values, those of the file and those given; it is itself a file for --config."""
    monkeypatch.chdir(tmp_path)

    def printed(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["train", *arguments, "--print_config"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    Path("some.yaml").write_text("num_iterations: 7\nlr: 0.5\n")
    out = printed("--model", "m", "--data", "d", "--preset", "grpo", "--config", "some.yaml", "--lr", "0.25")
    values = yaml.safe_load(out)
    assert {field.name for field in fields(Config)} <= values.keys()
    assert (values["num_iterations"], values["lr"], values["baseline"]) == (7, 0.25, "grpo")
    Path("printed.yaml").write_text(out)
    assert printed("--config", "printed.yaml") == out


def test_unknown_key_in_a_file(inputs, run):
    Path("run.yaml").write_text("learning_rate: 1\n")
    status, _, err = run("train-rm", "--data", inputs / "pairs.jsonl", "--config", "run.yaml")
    assert status == 2 and "'learning_rate' is not accepted" in err and err.count("\n") == 1
    Path("run.yaml").write_text("lr: [1\n")
    status, _, err = run("train-rm", "--data", inputs / "pairs.jsonl", "--config", "run.yaml")
    assert status == 2 and "Problems parsing config" in err and "line 1" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "line", "sentence"),
    [
        ("sft", "model:", "model must be str, got null"),
        ("sft", "lr: null", "lr must be float, got null"),
        ("sft", "device: ~", "device must be str, got null"),
        ("train-rm", "model: null", "model must be str, got null"),
        ("train", "seed: null", "seed must be int, got null"),
        ("train", "tensorboard: null", "tensorboard must be bool, got null"),
        ("eval", "eval_samples: null", "eval_samples must be int, got null"),
    ],
)
def test_null_in_a_file_is_no_value(run, command, line, sentence):
    Path("run.yaml").write_text(f"{line}\ndata: rows.jsonl\n")
    arguments = ["--model", "m"] if command in ("train", "eval") else []
    status, out, err = run(command, *arguments, "--config", "run.yaml")
    assert (status, out, err) == (2, "", f"qrm-fast {command}: error: {sentence}\n")


def test_an_adapter_as_a_model(inputs, run):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(inputs / "policy"), lora).save_pretrained("adapter")
    status, out, _ = run(
        "eval", "--model", "adapter", "--data", inputs / "prompts.jsonl", "--verifier", "arithmetic",
        "--max_new_tokens", 4, "--eval_samples", 1,
    )  # fmt: skip
    assert status == 0 and "Pass@1 on 16 problems" in out
    status, out, err = run("score", "--model", "adapter", "--prompt", "1+1:", "--response", "01+1=02")
    assert (status, out) == (2, "") and "must be a Q-RM or an ORM, a token classifier" in err and err.count("\n") == 1
    status, out, err = run("train-rm", "--model", "adapter", "--data", inputs / "pairs.jsonl", "--out", "out")
    assert (status, err) == (0, "") and "Q-RM  out" in out


def test_sequences_past_the_context_and_broken_weights(inputs, run):
    data = ["--data", inputs / "prompts.jsonl", "--verifier", "arithmetic"]
    past = "must fit the 2048 positions of "
    status, out, err = run("eval", "--model", inputs / "policy", *data, "--max_new_tokens", 4000)
    assert (status, out) == (2, "") and past in err
    status, out, err = run("score", "--model", inputs / "q_rm", "--prompt", "1+1:", "--response", "1" * 3000)
    assert (status, out) == (2, "") and past in err
    status, out, err = run(*train_arguments(inputs), "--max_new_tokens", 4000, "--max_tokens", 8000, "--out", "out")
    assert (status, out) == (2, "") and past in err and not Path("out").exists()
    for kind in ("policy", "q_rm"):
        shutil.copytree(inputs / kind, kind)
        weights = load_file(f"{kind}/model.safetensors")
        weights["model.norm.weight"][0] = torch.nan
        save_file(weights, f"{kind}/model.safetensors", metadata={"format": "pt"})
    broken = "must be finite, got NaN or infinity: its weights are broken"
    for arguments in (
        ["eval", "--model", "policy", *data],
        ["score", "--model", "q_rm", "--prompt", "1+1:", "--response", "01+1=02"],
        ["sft", "--model", "policy", "--data", inputs / "demonstrations.jsonl", "--out", "out"],
        [*train_arguments(inputs), "--q_rm", "q_rm", "--out", "out"],
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and broken in err and err.count("\n") == 1 and not Path("out").exists()


def test_runs_that_cannot_be_taken_up(inputs, run):
    """Every state damaged, none there, a folder that holds a run, one that the run reads from."""
    sft = ["sft", "--data", inputs / "demonstrations.jsonl", "--model", "scratch:demo", "--tokenizer", "arithmetic"]
    sft += ["--num_steps", 2, "--batch_size", 4, "--out", "out"]
    assert run(*sft, "--save_every", 1)[0] == 0
    (newest, older) = states(Path("out"))
    (newest / "__0_0.distcp").write_bytes(b"")
    (older / "about.json").write_text("{}")
    for arguments, sentence in (
        (
            [*sft, "--save_every", 1, "--resume"],
            f"out must hold a whole state, got 2 damaged: {newest.name} is the newest",
        ),
        (sft, "out holds a run: resume it, overwrite it, or choose another out"),
        ([*sft, "--model", "out", "--overwrite"], "out must be a directory of its own, got out, which is also model"),
    ):
        status, _, err = run(*arguments)
        assert status == 2 and err.endswith(f"qrm-fast sft: error: {sentence}\n") and "Traceback" not in err
    for path in (newest, older):
        shutil.rmtree(path)
    status, _, err = run(*sft, "--resume")
    assert status == 2 and "out must hold a state to go on from" in err and err.count("\n") == 1


def test_a_malformed_line_stops_every_training_before_it_writes(inputs, run):
    for command, name in (("sft", "demonstrations"), ("train-rm", "pairs"), ("train", "prompts")):
        lines = (inputs / f"{name}.jsonl").read_text().splitlines()
        Path("rows.jsonl").write_text("\n".join([*lines[:3], lines[3][:-1]]))
        arguments = train_arguments(inputs) if command == "train" else [command, "--tokenizer", "arithmetic"]
        status, out, err = run(*arguments, "--data", "rows.jsonl", "--out", "out")
        assert (status, out) == (2, "")
        assert f"qrm-fast {command}: error: rows.jsonl:4: expected one JSON object per line, got" in err
        assert not Path("out").exists()
    status, _, err = run("eval", "--model", inputs / "policy", "--data", "rows.jsonl")
    assert status == 2 and "rows.jsonl:4: expected one JSON object per line" in err


def test_a_sequence_over_the_token_budget(inputs, run):
    for arguments in (
        ["sft", "--data", inputs / "demonstrations.jsonl", "--tokenizer", "arithmetic", "--max_tokens", 20],
        ["train-rm", "--data", inputs / "pairs.jsonl", "--tokenizer", "arithmetic", "--max_tokens", 20],
        [*train_arguments(inputs), "--max_tokens", 10],
    ):
        status, out, err = run(*arguments, "--out", "out")
        assert (status, out) == (2, "") and "max_tokens" in err and err.count("\n") == 1
        assert not Path("out").exists()


def test_a_q_rm_of_another_vocabulary(inputs, run):
    other = load_tokenizer("bpe", ["1+1"])
    save_checkpoint(load_token_model("scratch:demo", other), other, "other")
    status, out, err = run(*train_arguments(inputs), "--q_rm", "other", "--out", "out")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "policy and reward model must share one vocabulary, got 18 and" in err
    assert not Path("out").exists()


def test_only_a_trained_q_rm_scores(inputs, run):
    """A policy has no score head: a fresh one would print noise."""
    status, out, err = run("score", "--model", inputs / "policy", "--prompt", "1+1:", "--response", "01+1=02")
    assert (status, out) == (2, "")
    assert "must be a Q-RM or an ORM, a token classifier with one label, got LlamaForCausalLM" in err
    tokenizer = load_tokenizer("arithmetic")
    save_checkpoint(load_token_model("scratch:demo", tokenizer, num_labels=3), tokenizer, "three")
    status, out, err = run("score", "--model", "three", "--prompt", "1+1:", "--response", "01+1=02")
    assert (status, out) == (2, "") and "got LlamaForTokenClassification, 3" in err
    status, out, err = run("score", "--model", inputs / "q_rm", "--prompt", "one", "--response", "01+1=02")
    assert (status, out) == (2, "") and "WordLevel error" in err
    status, out, err = run("score", "--model", inputs / "q_rm", "--prompt", "", "--response", "01+1=02")
    assert (status, out) == (2, "") and "prompt" in err


def test_the_program_exits_with_the_status(tmp_path):
    command = [sys.executable, "-m", "qrm_fast.cli", "plot", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"qrm-fast plot: error: expected a metrics.jsonl in {tmp_path} or below it, found none\n"


def test_a_reader_that_has_seen_enough():
    """As in `qrm-fast doctor | head`: not a word about it."""
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run([sys.executable, "-m", "qrm_fast.cli", "doctor"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (1, b"")


# ---- real pairs


def test_real_pairs_from_the_file_to_a_heat_map(real_data, run):
    lines = (real_data / "gsm8k_pairs.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    Path("pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = ["--model", "scratch:small", "--tokenizer", "bpe", "--num_epochs", 1, "--batch_size", 4, "--heldout", 0.2]
    status, out, err = run("train-rm", "--data", "pairs.jsonl", *model)
    assert (status, err) == (0, "")
    assert "8 pairs trained on" in out and "2 pairs held out" in out
    pair = Pair(**json.loads(lines[0]))
    answers = ["--response", pair.chosen, "--response", pair.rejected, "--plot", "q.png"]
    status, out, err = run("score", "--model", "runs/q_rm", "--prompt", pair.instruction, *answers)
    assert (status, err) == (0, "")
    assert Path("q.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = AutoTokenizer.from_pretrained("runs/q_rm")
    lengths = [len(tokenizer(text).input_ids) + 1 for text in (pair.chosen, pair.rejected)]
    assert len(cells(out)) == max(lengths)
