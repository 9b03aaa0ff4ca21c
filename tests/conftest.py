"""Poisoned memory, devices, threads, real data and fresh checkpoints, for every test.

Triton reads TRITON_INTERPRET when a kernel is decorated, so it is set here, before qrm_fast is imported: without a CUDA
device the tests run Triton kernels in the interpreter. With EMULATED=90 or 80 only the tests of Triton kernels are run,
on the machine code that Triton compiles for such a GPU (tests/ptx); with EMULATED=90a csrc/cuda serves heads.
"""

import json
import os
import zlib
from pathlib import Path

import pytest

# Read when torch is loaded: threads that wait by spinning starve the other processes of `make test`.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

EMULATED = os.environ.get("EMULATED", "")
if EMULATED:
    from ptx import triton_launches

    triton_launches.install(int(EMULATED.removesuffix("a")))
    if EMULATED.endswith("a"):
        from ptx import cuda_launches

        cuda_launches.install()
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()
# Its key leaves out the gradient formulas of custom ops: a compiled graph of an older checkout would be run.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"


def pytest_addoption(parser):
    parser.addoption("--real-data", type=Path, help="folder with gsm8k_pairs.jsonl and the other real data files")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; `make gpu` runs these")
    config.addinivalue_line("markers", "unpoisoned: runs as users do, without PyTorch's deterministic mode")
    config.addinivalue_line("markers", "overlapping: sequences share rows, for which blocks may then race")
    config.addinivalue_line("markers", "vectors: test_narrower_vectors.py runs it on CPU kernels of narrower vectors")


def pytest_collection_modifyitems(config, items):
    if EMULATED:
        unasked = [item for item in items if "triton_device" not in item.fixturenames]
        config.hook.pytest_deselected(items=unasked)
        items[:] = [item for item in items if "triton_device" in item.fixturenames]
    for item in items:
        device = getattr(item, "callspec", None) and item.callspec.params.get("device")
        if device == "cuda" or ("triton_device" in item.fixturenames and torch.cuda.is_available()):
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item):
    if EMULATED:
        triton_launches.state["seed"] = zlib.crc32(item.nodeid.encode())  # alone as among others
        triton_launches.state["blocks_may_race"] = item.get_closest_marker("overlapping") is not None


def pytest_sessionfinish():
    if EMULATED and "EMULATED_COUNTS" in os.environ:
        Path(os.environ["EMULATED_COUNTS"]).write_text(json.dumps(triton_launches.counts))


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Fills uninitialised tensors, in Python and in the kernels, with NaN or the largest integer.

    A kernel that leaves a row unwritten then fails any comparison. PyTorch does this in its deterministic mode only,
    which also changes how its own operators compute: tests of our promises about bits carry the mark `unpoisoned`.
    """
    poisoned = request.node.get_closest_marker("unpoisoned") is None
    torch.use_deterministic_algorithms(poisoned, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def waiting_allowed():
    """After a test that failed where waiting for the device is an error, the next one may wait again."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """A device with registered kernels; the CUDA case carries the mark `gpu`."""
    return request.param


@pytest.fixture
def triton_device():
    """Where a Triton launcher called by itself runs: the GPU, or the CPU, interpreted or emulated."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def real_data(request):
    """The folder given as --real-data."""
    folder = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("no --real-data DIR given")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A fresh policy, a fresh Q-RM, a fresh PRM, two fresh models with a head of Q-values, and 16 prompts."""
    from qrm_fast.rl.arithmetic import arithmetic_examples
    from qrm_fast.rl.checkpoint import save_checkpoint
    from qrm_fast.rl.data import STEP, write_jsonl
    from qrm_fast.rl.models import load_policy, load_token_model
    from qrm_fast.rl.tokenizers import load_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    save_checkpoint(load_policy("scratch:demo", tokenizer), tokenizer, folder / "policy")
    save_checkpoint(load_token_model("scratch:demo", tokenizer), tokenizer, folder / "q_rm")
    prm = load_token_model("scratch:demo", tokenizer, num_labels=2)
    prm.config.step_separator = STEP
    save_checkpoint(prm, tokenizer, folder / "prm")
    q_model = load_policy("scratch:demo", tokenizer)
    q_model.config.reward_model = "qrm-vocab"
    save_checkpoint(q_model, tokenizer, folder / "q_vocab")
    q_model.config.reference_model, q_model.config.implicit_beta = str(folder / "policy"), 0.1
    save_checkpoint(q_model, tokenizer, folder / "implicit")
    write_jsonl(folder / "prompts.jsonl", arithmetic_examples(16, split="train", seed=0))
    return folder
