"""A sample of the tests of Triton kernels on the PTX that Triton compiles for a GPU, and mutants of that PTX.

The sample launches every kernel; `make test-ptx` runs all tests of Triton kernels so. A process of its own, because
Triton decides at decoration whether kernels are interpreted.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qrm_fast

ROOT = Path(__file__).parents[2]
SAMPLE = {  # tests of each file, or the whole file
    "ptx/mutants.py": [],
    "ptx/row_costs.py": [],
    "test_gather_logprobs.py": [
        "test_triton_bits_of_a_row_depend_on_the_row_alone",
        "test_triton_marks_targets_outside",
    ],
    "test_group_advantages.py": ["test_hand_computed"],
    "test_linear_logprobs_partial.py": ["test_triton_four_shards_merge_to_the_whole"],
    "test_linear_logprobs_triton.py": ["test_each_gradient_alone", "test_rows_without_gradient_never_leak"],
    "test_linear_policy_loss_triton.py": ["test_only_needed_gradients_are_formed", "test_idle_rows_and_wild_targets"],
    "test_linear_q_values.py": ["test_triton_non_finite_rows_stay_alone", "test_triton_table"],
    "test_linear_sample.py": [
        "test_by_hand",
        "test_the_logprob_has_the_bits_of_linear_logprobs_by_triton[torch.bfloat16-plain]",
    ],
    "test_min_form_returns.py": ["test_triton_agrees_with_the_definition"],
    "test_moments.py": ["test_hand_computed", "test_triton_bits_depend_on_the_own_rows_only"],
    "test_pairwise_q_loss.py": ["test_triton_bits_depend_on_the_own_pair_only", "test_triton_extreme_margins_and_nan"],
    "test_policy_loss_triton.py": ["test_bits_do_not_depend_on_other_rows", "test_rows_of_no_sequence_are_nan"],
    "test_process_advantages_triton.py": ["test_golden_c"],
    "test_process_diagnostics.py": ["test_triton_as_the_cpu_kernel"],
    "test_q_head_advantages.py": ["test_triton_bits_depend_on_the_own_sequence_only"],
    "test_q_token_rewards.py": ["test_triton_bits_depend_on_the_own_sequence_only"],
    "test_token_q.py": [
        "test_triton_sums_of_actions_that_cross_blocks",
        "test_triton_bits_of_a_row_depend_on_the_row_alone",
    ],
    "test_value_loss.py": ["test_triton_table_and_not_a_number"],
}


def emulated(gpu: str, tests: list[str], counts: Path) -> dict[str, list[int]]:
    """Runs tests for such a GPU; launches and instructions of each Triton kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    environment |= {"EMULATED": gpu, "EMULATED_COUNTS": str(counts)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return json.loads(counts.read_text())


def launched_kernels() -> set[str]:
    """Those that some launcher launches."""
    texts = [file.read_text() for file in Path(qrm_fast.__file__).parent.glob("triton/*.py")]
    jitted = {name for text in texts for name in re.findall(r"@triton\.jit.*?\ndef (\w+)", text, re.DOTALL)}
    return {name for name in jitted if any(re.search(rf" {name}\[\D", text) for text in texts)}


def test_a_sample_of_every_kernel(tmp_path):
    tests = [
        f"tests/{'::'.join(x)}" for file, names in SAMPLE.items() for x in ([(file, n) for n in names] or [(file,)])
    ]
    counts = emulated("90", tests, tmp_path / "counts.json")
    missed = launched_kernels() - counts.keys()
    assert not missed, f"the sample does not launch {sorted(missed)}"


def test_products_of_an_older_gpu(tmp_path):
    emulated("80", ["tests/ptx/mutants.py"], tmp_path / "counts.json")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_heads_of_hopper(tmp_path):
    """Beside Triton's kernels; the loss, whose exponentials are kept; what is sampled."""
    tests = {
        "test_linear_logprobs_triton.py": ["test_both_folds_agree", "test_both_gradients_agree"],
        "test_linear_policy_loss_triton.py": ["test_same_logprobs_as_the_head_and_as_its_two_parts[described-plain]"],
        "test_linear_sample.py": [
            "test_the_logprob_has_the_bits_of_linear_logprobs_by_triton[torch.bfloat16-everything]"
        ],
    }
    counts = emulated(
        "90a", [f"tests/{f}::{name}" for f, names in tests.items() for name in names], tmp_path / "counts.json"
    )
    assert "linear_policy_loss_dz" in counts and "linear_sample_rows" in counts
