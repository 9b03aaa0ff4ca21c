"""The Python of the pages runs as it stands, and the site's pages are there.

The blocks of a page run in order and share their names. One that cannot run here has a title, which readers see.
"""

import re
from pathlib import Path

import pytest
import torch

from qrm_fast.cli import main
from qrm_fast.rl.tokenizers import load_tokenizer

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
PAGES = {
    page.stem: blocks for page in sorted((ROOT / "docs").glob("*.md")) if (blocks := BLOCK.findall(page.read_text()))
}


def of_advantages() -> dict[str, object]:
    """A padded batch of two answers to one prompt."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    ends = torch.tensor([[0, 1, 1], [0, 1, 0]], dtype=torch.bool)
    return {
        "response_mask": mask,
        "step_end_mask": ends,
        "prm_scores": torch.randn(2, 3),
        "group_ids": torch.zeros(2).long(),
    }


def of_integrations() -> dict[str, object]:
    """Two tokenizers, and a score for each token of one."""
    import qrm_fast.rl.span_projection as span_projection

    tokenizer = load_tokenizer("arithmetic")
    ids = tokenizer("1+1=2", add_special_tokens=False)["input_ids"]
    return vars(span_projection) | {
        "policy_tokenizer": tokenizer,
        "reward_tokenizer": tokenizer,
        "response_ids": ids,
        "q_of_reward_ids": torch.arange(len(ids), dtype=torch.float32),
    }


GIVEN = {"advantages": of_advantages, "integrations": of_integrations}  # what a page takes for granted


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    import qrm_fast

    names = {"torch": torch, "qrm_fast": qrm_fast} | (GIVEN[page]() if page in GIVEN else {})
    for title, code in PAGES[page]:
        if title:
            assert re.fullmatch(r' title="needs .+"', title), f"{page}: {title} does not say what the block needs"
        else:
            exec(compile(code, f"docs/{page}.md", "exec"), names)


def test_the_site_leads_to_pages_that_are_there():
    """Those of docs, and those that docs/pages.py makes."""
    made = {
        "index.md",
        "which-op.md",
        "contributing.md",
        "changelog.md",
        "api-ops.md",
        "api-integrations.md",
        "api-loop.md",
    }
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named <= made | {page.name for page in (ROOT / "docs").glob("*.md")}


PLANS = re.findall(
    r"^```console\n\$ qrm-fast (plan .*)\n((?:.*\n)*?)```$", (ROOT / "docs/scaling.md").read_text(), re.M
)


@pytest.mark.parametrize(("command", "printed"), PLANS, ids=[command for command, _ in PLANS])
def test_an_estimate_is_what_its_command_prints(command, printed, capsys):
    assert main(command.split()) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == printed.splitlines()


def test_estimates_are_there():
    assert len(PLANS) >= 3
