"""The ops ask for what pyproject.toml calls the base dependencies, and for nothing else."""

import ast
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
OF_THE_LOOP = ["transformers", "tokenizers", "safetensors", "matplotlib", "jsonargparse", "rich", "tensorboard"]


def base_dependencies() -> list[Requirement]:
    text = re.search(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    return [Requirement(line) for line in ast.literal_eval(text)]


def needed(requirements: list[Requirement], found: set[str]) -> set[str]:
    """The distributions that these ask for on this machine, one leading to another."""
    for requirement in requirements:
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in found:
            found.add(requirement.name)
            needed([Requirement(line) for line in distribution(requirement.name).requires or []], found)
    return found


@pytest.fixture(scope="module")
def base_python(tmp_path_factory):
    """The interpreter of a new environment with this one's copies of the base dependencies."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    for name in needed(base_dependencies(), set()):
        installed = distribution(name)
        for top in {Path(file).parts[0] for file in installed.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(installed.locate_file(top))
    return environment / "bin/python"


def run(python: Path | str, *arguments: str) -> subprocess.CompletedProcess:
    """qrm_fast comes from this checkout; nothing else comes from PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def check_the_ops_load_nothing_else(python: Path | str) -> None:
    done = run(python, "tests/every_op.py")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines())
    assert "qrm_fast.ops.gae" in loaded and not loaded & {*OF_THE_LOOP, "qrm_fast.rl"}


def test_every_op_runs_on_the_base_dependencies(base_python):
    installed = run(
        base_python, "-c", f"from importlib.util import find_spec; print(*filter(find_spec, {OF_THE_LOOP}))"
    )
    assert installed.stdout == "\n", "nothing of the loop's may be there, or this test shows nothing"
    check_the_ops_load_nothing_else(base_python)


def test_the_ops_leave_the_loop_and_its_packages_alone_where_they_are_installed():
    check_the_ops_load_nothing_else(sys.executable)


def test_the_command_line_names_its_extra(base_python):
    done = run(base_python, "-m", "qrm_fast.cli", "doctor")
    assert done.returncode != 0
    assert "the command line needs the extra `train`: pip install 'qrm_fast[train]'" in done.stderr
