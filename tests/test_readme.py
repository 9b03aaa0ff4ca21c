"""The examples of README run as they stand; the commands of README and docs have the options that they name."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qrm_fast import pack
from qrm_fast.cli import main
from qrm_fast.rl.attention import packed_hidden
from qrm_fast.rl.checkpoint import save_checkpoint
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.tokenizers import load_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)
COMMANDS = sorted(
    {
        re.sub("^torchrun .* -m qrm_fast.cli", "qrm-fast", line)
        for page in PAGES
        for line in re.findall(r"^(?:qrm-fast|torchrun) .*", page.read_text(), flags=re.MULTILINE)
    }
)


def example(name):
    return next(text for text in EXAMPLES if name in text)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("arithmetic")


def test_the_line_that_replaces_log_softmax_gives_the_same(tokenizer):
    torch.manual_seed(0)
    model = load_policy("scratch:demo", tokenizer).eval()
    model.set_attn_implementation("sdpa")
    old, new = example("log_softmax"), example("qrm_fast.linear_logprobs(hidden, model")
    input_ids = torch.randint(2, 17, (2, 9))
    targets = input_ids.roll(-1, 1)
    action_mask = torch.ones(2, 9, dtype=torch.bool)
    names = {"model": model, "input_ids": input_ids, "targets": targets, "temperature": 0.7}
    with torch.no_grad():
        exec(old, names)
        expected = names["logprobs"], names["entropy"]
        exec(new, names | {"action_mask": action_mask, "targets": targets[action_mask]}, got := {})
    for name, value in zip(("logprobs", "entropy"), expected, strict=True):
        torch.testing.assert_close(got[name], value[action_mask], rtol=1e-5, atol=1e-5)


def test_token_lists_to_an_update(tokenizer):
    torch.manual_seed(0)
    policy = load_policy("scratch:demo", tokenizer)
    sequences, prompt_lens = [[2, 3, 4, 5, 1], [6, 7, 8, 1]], [2, 1]
    names = {
        "torch": torch,
        "policy": policy,
        "q_rm": load_token_model("scratch:demo", tokenizer),
        "packed_hidden": packed_hidden,
        "sequences": sequences,
        "prompt_lens": prompt_lens,
        "sampled": torch.full((int(pack(sequences, prompt_lens).action_cu_seqlens[-1]),), -2.8),
    }
    exec("import qrm_fast\n" + example("qrm_fast.pack"), names)
    names["loss"].backward()
    assert policy.lm_head.weight.grad.abs().sum() > 0


def test_padded_batches_at_the_edge():
    response_mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    rewards, values = torch.randn(2, 3), torch.randn(2, 3)
    names = {"response_mask": response_mask, "rewards": rewards, "values": values}
    exec("import qrm_fast\n" + example("from_padded"), names)
    last = rewards[1, 2] - values[1, 2]
    torch.testing.assert_close(names["advantages"][1, 2], last)
    assert names["advantages"][0, 2] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_that_are_named(command, capsys):
    _, name, *arguments = shlex.split(command, comments=True)
    kind = arguments[arguments.index("--kind") :][:2] if "--kind" in arguments else []  # which options there are
    with pytest.raises(SystemExit) as ended:
        main([name, *kind, "--help"])
    assert ended.value.code == 0
    known = re.findall(r"--[a-z_]+", capsys.readouterr().out)
    assert {x for x in arguments if x.startswith("--")} <= {*known, "--help"}


def test_gsm8k_with_a_1_5b_model_in_miniature(tmp_path, monkeypatch, capsys):
    """The lines of README, in order, on a tiny model, problems made here and a hub that holds them."""
    monkeypatch.chdir(tmp_path)
    problems = [
        {"question": f"Ann has {i} cows and buys {i}. Now?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in range(9)
    ]
    hub = SimpleNamespace(load_dataset=lambda name, config, *, split: problems if split == "train" else problems[:3])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    tokenizer = load_tokenizer("bpe", [text for problem in problems for text in problem.values()])
    torch.manual_seed(0)
    save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, "policy")
    section = PAGES[0].read_text().split("## GSM8K with a 1.5B model")[1].split("```")[1].strip()
    lines = [re.sub("^torchrun .* -m qrm_fast.cli", "qrm-fast", line) for line in section.splitlines()]
    assert [shlex.split(line)[1] for line in lines] == ["eval", "train", "train", "eval", "plot"]
    small = {"Qwen/Qwen2.5-1.5B-Instruct": "policy", "cuda": "cpu", "bfloat16": "float32"}
    for number, line in enumerate(lines):
        _, name, *arguments = shlex.split(line)
        arguments = [small.get(x, x) for x in arguments]
        if name != "plot":
            arguments += ["--max_new_tokens", "6"]
        if name == "train":
            arguments += ["--num_prompts", "2", "--num_iterations", str(number), "--save_every", "1", "--lr", "1e-3"]
        assert main([name, *arguments]) == 0, capsys.readouterr().err
    assert [row["step"] for row in map(json.loads, Path("runs/gsm8k/metrics.jsonl").read_text().splitlines())] == [
        0,
        1,
        2,
    ]
    assert Path("runs/gsm8k/curves.png").exists()


def test_links_lead_somewhere():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).is_file(), f"{page.name} links to {target}"
