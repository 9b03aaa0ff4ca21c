"""A slot on a GPU loses one case to a crash, a hang or a lost device, and what it runs there is rehearsed here.

`rehearsal` stands in for the device.
"""

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import slot
from bench.__main__ import adopt
from bench.journal import Journal, ends

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rehearsed(tmp_path, monkeypatch):
    """Every Python that a test starts sees the device that is none."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text("import rehearsal\n")
    path = [tmp_path / "site", ROOT / "tests", ROOT]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, path)))
    monkeypatch.setenv("COMMIT", "0123456789abcdef")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def run(suite: slot.Suite, folder: Path, seconds: float = 300.0, **options) -> tuple[dict[str, dict], str | None]:
    journal = Journal(folder / "slot/journal.jsonl")
    claims = folder / "claims"
    claims.mkdir(exist_ok=True)
    why = slot.run(suite, journal, str(claims), slot.time.monotonic() + seconds, **options)
    return ends(journal.entries()[0]), why


def outcomes(done: dict[str, dict]) -> dict[str, str]:
    return {case.rpartition("::")[2]: end["outcome"] for case, end in done.items()}


PLANTED = """
    import os, signal, time
    import pytest, rehearsal, torch

    pytestmark = pytest.mark.gpu

    def test_good(): pass
    def test_wrong(): assert 1 == 2, "row 3 is off"
    def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
    @pytest.mark.parametrize("x", [1, 2, 3])
    def test_hang(x):
        if x == 2: time.sleep(1000)
    def test_exit(): os._exit(0)
    def test_sticky():
        rehearsal.lost = True
    def test_after_sticky(): torch.cuda.synchronize()
    def test_leaves_waiting_forbidden():
        torch.cuda.set_sync_debug_mode("error")
        raise ValueError("before it is allowed again")
    def test_waits(): assert torch.cuda.get_sync_debug_mode() == "default"
    def test_skipped(): pytest.skip("not today")
    def test_last(): pass
"""
EXPECTED = {
    **{f"test_{name}": "passed" for name in ("good", "after_sticky", "waits", "last", "hang[1]", "hang[3]")},
    **{f"test_{name}": "lost" for name in ("crash", "hang[2]", "exit")},
    **{f"test_{name}": "failed" for name in ("wrong", "sticky", "leaves_waiting_forbidden")},
    "test_skipped": "skipped",
}


def test_a_test_is_lost_alone(tmp_path, rehearsed):
    """Two workers share the files; one needs a package that is not installed, another cannot be read."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_planted.py").write_text(textwrap.dedent(PLANTED))
    (tests / "test_needs_a_package.py").write_text("raise ModuleNotFoundError(name='jsonargparse')")
    (tests / "test_broken.py").write_text("raise ModuleNotFoundError(name='qrm_faster')")
    options = ["-p", "bench.journaled_tests", "-p", "conftest", f"--rootdir={tmp_path}", str(tests)]
    command = [sys.executable, *slot.PYTEST, *options]
    outcome = {status: "finished" for status in (0, 1, 5)}
    suite = slot.Suite("tests", lambda: [slot.Task(f"tests {i}", command, outcome, start=i / 2) for i in (0, 1)], 2)

    done, why = run(suite, tmp_path, case_seconds=4)
    assert why is None
    files = {"tests/test_needs_a_package.py": "skipped", "tests/test_broken.py": "failed"}
    assert outcomes(done) == EXPECTED | files | {"tests 0": "finished", "tests 1": "finished"}
    by_name = {case.rpartition("::")[2]: end.get("why") for case, end in done.items()}
    assert by_name["test_crash"] == "killed by SIGSEGV" and by_name["test_hang[2]"] == "silent for 4 s"
    assert by_name["tests/test_needs_a_package.py"] == "no package jsonargparse"
    assert "row 3 is off" in by_name["test_wrong"] and "illegal memory access" in by_name["test_sticky"]

    entries = Journal(tmp_path / "slot/journal.jsonl").entries()[0]
    begun = [entry["begin"] for entry in entries if "begin" in entry]
    assert len(begun) == len(set(begun)), "each by one worker, and nothing twice"
    lines = list(slot.table(entries, {"heads": "the time"}))
    assert "tests: 6 passed, 2 skipped, 4 failed, 3 lost" in lines and len(lines) < 20
    assert any("test_wrong: " in line and "row 3 is off" in line for line in lines)
    assert any(line.startswith("stopped: heads: the time is over") for line in lines)


STAND_INS = """
    import os, time
    import rehearsal
    from bench import __main__, harness

    def case(name, run):
        ways = {"providers": {"qrm_fast": run}, "baseline": {"copy": lambda: None}, "bytes": 8_000_000}
        build = lambda: harness.Case(gate=lambda: None, **ways)
        harness.CASES[name] = harness.Registered("planted", "cuda", build)

    def sticky():
        rehearsal.lost = True
        raise RuntimeError("an illegal memory access")

    case("first", lambda: None)
    case("crash", lambda: os.abort())
    case("second", lambda: None)
    case("hang", lambda: time.sleep(1000))
    case("sticky", sticky)
    case("last", lambda: None)
    __main__.main()
"""


def test_a_bench_case_is_lost_alone_and_nothing_is_run_twice(tmp_path, rehearsed):
    (tmp_path / "stand_ins.py").write_text(textwrap.dedent(STAND_INS))
    command = [sys.executable, str(tmp_path / "stand_ins.py"), "planted", "--device", "cuda", "--worker"]
    suite = slot.Suite("planted", lambda: [slot.Task("planted", command)])
    done, _ = run(suite, tmp_path, case_seconds=4)
    good = {name: "measured" for name in ("first", "second", "last")}
    lost = {"crash": "lost", "hang": "lost", "sticky": "refused"}
    assert outcomes(done) == good | lost | {"planted": "finished"}
    assert done["crash"]["why"] == "killed by SIGABRT"

    journal = tmp_path / "slot/journal.jsonl"
    before = journal.read_text()
    run(suite, tmp_path)
    assert journal.read_text() == before

    adopt([tmp_path / "slot"], tmp_path / "results")
    results = json.loads((tmp_path / "results/cuda-no-gpu.json").read_text())
    assert [r["case"] for r in results["records"]] == ["first", "second", "sticky", "last"]
    assert results["lost"].keys() == {"crash", "hang"}
    assert results["records"][0]["provenance"]["commit"] == "0123456789abcdef"
    assert "tests" not in results and "sanitizer" not in results, "suites that did not run would take others' places"
    with pytest.raises(FileNotFoundError):
        adopt([tmp_path / "slut"], tmp_path / "results")


def test_the_time_ends_a_suite_and_the_next_call_goes_on(tmp_path):
    """Without a last word: the case that ran is run again."""
    script = """
        import os, sys, time
        from bench.journal import Worker
        worker = Worker()
        for case in "ab":
            if case not in worker.settled:
                worker.begin(case)
                if case == "b" and sys.argv[1] == "slow":
                    time.sleep(1000)
                worker.end(case, "measured")
    """

    def suite(speed: str) -> slot.Suite:
        command = [sys.executable, "-c", textwrap.dedent(script), speed]
        return slot.Suite("s", lambda: [slot.Task("s", command)])

    done, why = run(suite("slow"), tmp_path, seconds=5)
    assert why == "the time" and outcomes(done) == {"a": "measured"}
    done, why = run(suite("fast"), tmp_path)
    assert why is None and outcomes(done) == {"a": "measured", "b": "measured", "s": "finished"}


def test_a_task_that_dies_outside_its_cases_is_lost_with_its_last_line(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('torch sees no CUDA device')"]
    done, _ = run(slot.Suite("s", lambda: [slot.Task("s", command)]), tmp_path)
    assert (done["s"]["outcome"], done["s"]["why"]) == ("lost", "exit status 1: torch sees no CUDA device")
    done, _ = run(slot.Suite("s", lambda: [slot.Task("s", [sys.executable, "-c", ""])]), tmp_path)
    assert done["s"]["outcome"] == "finished", "a lost task has another chance in the next call"


def test_a_line_cut_short_takes_no_other_with_it(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(end="a", outcome="passed")
    with journal.path.open("a") as file:
        file.write('{"end": "b", "outco')
    journal.write(end="c", outcome="passed")
    assert ends(journal.entries()[0]).keys() == {"a", "c"}


def test_every_benchmark_for_cuda_passes_its_gate(tmp_path, rehearsed):
    """The whole of it but the sizes: harness, gates, errors, journal, table."""
    plan = "[slot.Suite('benches', lambda: [task for name in slot.BENCHES for task in slot.bench(name)], 2)]"
    command = [sys.executable, "-c", f"import sys; from bench import slot; sys.exit(slot.main({plan}))"]
    command += ["--out", str(tmp_path / "slot"), "--seconds", "240"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [
        end["record"] for end in ends(Journal(tmp_path / "slot/journal.jsonl").entries()[0]).values() if "record" in end
    ]
    assert {record["suite"] for record in records} == set(slot.BENCHES)
    errors = [(r["case"], way) for r in records for way in r.get("absent", {}) if way.startswith("error of")]
    assert not errors


def test_every_op_is_called_as_on_cuda(rehearsed):
    """What compute-sanitizer watches: the checks of CUDA tensors let it pass, no device is mixed with another."""
    command = [sys.executable, "tests/every_op.py", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_op_reaches_every_registered_op():
    import every_op
    from torch._library.custom_ops import OPDEFS

    seen = set()

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.name())
            return function(*args, **(kwargs or {}))

    with Seeing():
        for ways in every_op.calls("cpu", 1).values():
            for call in ways:
                losses = [x.float().sum() for x in every_op.tensors(call()) if x.requires_grad]
                torch.autograd.backward(losses) if losses else None
    unseen = {name for name in OPDEFS if name.startswith("qrm_fast::")} - seen
    assert unseen == {"qrm_fast::process_advantages"}  # of several ranks; its kernels serve process_rows, too


def test_the_sanitizer_watches_every_op_with_every_tool(tmp_path, rehearsed, monkeypatch):
    """A stand-in for it, which finds something in gae and loses whiten."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(
        'case "$*" in *gae) echo "ERROR SUMMARY: 3 errors"; exit 86;; *whiten) kill -9 $$;; esac\nexit 0\n'
    )
    sanitizer.write_text("#!/bin/sh\n" + sanitizer.read_text())
    sanitizer.chmod(sanitizer.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done, _ = run(slot.Suite("sanitizer", slot.sanitized, 8), tmp_path)
    assert {
        "memcheck linear_logprobs",
        "racecheck gae",
        "initcheck token_q",
        "memcheck test_scan_cuda.py",
    } <= done.keys()
    by_outcome = slot.results(Journal(tmp_path / "slot/journal.jsonl").entries()[0])["sanitizer"]
    tools = "memcheck", "racecheck", "initcheck"
    assert by_outcome["failed"].keys() == {f"{tool} {op}" for tool in tools for op in ("gae", "min_gae")}
    assert by_outcome["failed"]["memcheck gae"] == "exit status 86: ERROR SUMMARY: 3 errors"
    assert by_outcome["lost"].keys() == {f"{tool} whiten" for tool in tools}


def test_a_suite_that_cannot_be_planned_is_lost_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slot.Path, "glob", lambda *_: iter(()))
    done, _ = run(slot.Suite("sanitizer", slot.sanitized), tmp_path)
    assert "no compute-sanitizer" in done["plan of sanitizer"]["why"]


def test_the_limit_is_the_larger_of_bytes_and_flops():
    record = {"bytes": 1, "flops": 2 * 16384 * 3584 * 152064, "provenance": {"hardware": "NVIDIA H200"}}
    assert slot.limit_ms(record) == pytest.approx(22.66, abs=0.01)
    assert slot.limit_ms(record | {"bytes": 16 * 2**24, "flops": 0}) == pytest.approx(0.0624, abs=1e-4)
    assert slot.limit_ms(record | {"provenance": {"hardware": "another"}}) is None


def test_every_suite_with_cases_for_cuda_is_in_the_slot():
    from bench import conftest  # which imports the suites

    cases = conftest.CASES.values()
    assert {case.suite for case in cases if case.device == "cuda"} == set(slot.BENCHES)


def test_make_gpu_installs_nothing(tmp_path):
    """Not even where no environment is active: the GPU's machine has no network."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "-n", "gpu", "SUITE=heads tests", "SECONDS=5", f"OUT={tmp_path}", "COMMIT=0123"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "pip" not in printed and "venv" not in printed
    assert f"bench.slot heads tests --seconds 5 --out {tmp_path}" in printed
