"""A slot on a GPU machine, of which a crash costs one case: `make gpu`, or `make gpu SUITE=heads SECONDS=560`.

Suites run one after the other, each in processes of its own that write the begin and the end of every case to a
journal. What crashes, falls silent or loses its device is lost alone: a fresh process goes on behind it. What has an
end is not run again, so the same command goes on where the last one stopped. The table of all that the journal holds
comes last, whatever happened. Only the standard library is imported here: nothing that is measured can stop it.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .journal import RESTART, Journal, ends

ROOT = Path(__file__).parent.parent
SUITE_SECONDS = 480
CASE_SECONDS = 180  # between two lines that a process writes to the journal, and before the first
CORES = len(os.sched_getaffinity(0))
PYTEST = "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"
OUTCOMES = "passed", "skipped", "failed", "lost"
SANITIZER_FOUND = 86  # its exit status, where it has something to say
# What a memory-bound and an arithmetic-bound result cannot beat, in bytes and FLOPs per second: measured, not promised.
LIMITS = {"NVIDIA H200": (4.3e12, 788e12)}


@dataclass
class Task:
    """A process to run, a case by itself or the worker of many; `outcomes` says what its exit status means."""

    name: str
    command: list[str]
    outcomes: dict[int, str] = field(default_factory=lambda: {0: "finished"})
    environment: dict[str, str] = field(default_factory=dict)
    start: float = 0.0  # the share of the cases that it leaves to the others at first
    patience: float = CASE_SECONDS  # with its silence outside of a case


@dataclass
class Suite:
    name: str
    tasks: Callable[[], list[Task]]
    at_once: int = 1
    needed: bool = False  # by all that follow; run even where the journal has its end, since the machine may be another


def build() -> list[Task]:
    return [Task("build", ["make", "build/built", f"PYTHON={sys.executable}"], patience=SUITE_SECONDS)]


def bench(name: str) -> list[Task]:
    return [Task(name, [sys.executable, "-m", "bench", name, "--device", "cuda", "--worker"])]


def tests() -> list[Task]:
    command = [sys.executable, *PYTEST, "-p", "bench.journaled_tests"]
    one_core = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # as many processes as cores
    outcomes = {status: "finished" for status in (0, 1, 5)}  # with failures, without a test
    return [Task(f"tests {i + 1}", command, outcomes, one_core, i / CORES) for i in range(CORES)]


def sanitized() -> list[Task]:
    """Every op under every tool, and the tests of corrupted boundaries under memcheck, each in its own process."""
    path = os.pathsep.join([os.environ["PATH"], *map(str, Path("/usr/local").glob("cuda*/bin"))])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        raise FileNotFoundError("no compute-sanitizer on the PATH or beside a CUDA compiler")
    # Each tensor in memory of its own: in PyTorch's pool a neighbour's memory would be taken for the tensor's.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    outcomes = {0: "passed", 1: "failed", 5: "skipped", SANITIZER_FOUND: "failed"}  # 5: pytest finds no such test

    def watched(tool: str, name: str, command: list[str]) -> Task:
        watch = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)]
        return Task(f"{tool} {name}", [*watch, sys.executable, *command], outcomes, environment, patience=SUITE_SECONDS)

    every_op = [sys.executable, "tests/every_op.py", "--device", "cuda"]
    ops = subprocess.run([*every_op, "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tools = "memcheck", "racecheck", "initcheck"
    tasks = [watched(tool, op, [*every_op[1:], op]) for tool in tools for op in ops]
    corrupted = "inside_its_tensors or inside_their_tensors or broken_boundaries or out_of_range"
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        if re.search(rf"def test_\w*({corrupted.replace(' or ', '|')})", file.read_text()):
            tasks.append(watched("memcheck", file.name, [*PYTEST, "-k", corrupted, f"tests/{file.name}"]))
    return tasks


OPS = "advantages", "logits", "policy", "process", "heads", "models", "growth"
BENCHES = *OPS, "update", "shared_prompts", "rollout"
PLAN = [
    Suite("build", build, needed=True),
    *(Suite(name, partial(bench, name)) for name in BENCHES),
    Suite("tests", tests, at_once=CORES),
    Suite("sanitizer", sanitized, at_once=CORES),
]


class Process:
    """A task that runs: what it last wrote, and the case that it is in."""

    def __init__(self, task: Task, journal: Journal, claims: str) -> None:
        self.task, self.journal = task, journal
        self.case: str | None = None
        self.ended = 0  # cases
        self.silence = 0.0  # seconds since the last word of it
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  closed with this object
        told = {"WORKER": task.name, "START": str(task.start), "JOURNAL": str(journal.path), "CLAIMS": claims}
        packages = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        self.process = subprocess.Popen(
            task.command,
            cwd=ROOT,
            env=os.environ
            | task.environment
            | {"PYTHONPATH": packages}
            | {f"SLOT_{key}": value for key, value in told.items()},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def hear(self, entry: dict) -> None:
        self.silence = 0.0
        self.case = entry.get("begin")
        self.ended += "end" in entry

    def kill(self) -> None:
        """The process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self, why: str | None) -> bool:
        """Write how it ended; whether a fresh process is to go on behind the case that this one was lost in."""
        status = self.process.wait()
        self.output.seek(0)
        output = self.output.read().decode(errors="replace")[-4000:]
        last_line = (output.strip().splitlines() or [""])[-1]
        why = why or (
            f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}: {last_line}"
        )
        if self.case:
            if self.case not in ends(self.journal.entries()[0]):  # its last word may have come since
                self.journal.write(end=self.case, worker=self.task.name, outcome="lost", why=why, output=output)
            return True
        if status == RESTART and self.ended:
            return True
        outcome = self.task.outcomes.get(status, "lost")
        details = {} if outcome in ("finished", "passed") else {"why": why, "output": output}
        self.journal.write(end=self.task.name, worker=self.task.name, outcome=outcome, **details)
        return False


def run(suite: Suite, journal: Journal, claims: str, deadline: float, case_seconds: float = CASE_SECONDS) -> str | None:
    """Run what the journal has no end of; returns why that is not all of it."""
    entries, offset = journal.entries()
    settled = {case for case, end in ends(entries).items() if not suite.needed and end["outcome"] != "lost"}
    try:
        waiting = [task for task in suite.tasks() if task.name not in settled]
    except Exception as error:  # a suite that cannot be planned is lost alone
        journal.write(end=f"plan of {suite.name}", outcome="lost", why=f"{type(error).__name__}: {error}")
        return None
    if f"plan of {suite.name}" in ends(entries):
        journal.write(end=f"plan of {suite.name}", outcome="finished")
    running: dict[str, Process] = {}
    begin = now = time.monotonic()
    try:
        while waiting or running:
            if now > min(begin + SUITE_SECONDS, deadline):
                return f"{SUITE_SECONDS} s of this suite" if now < deadline else "the time"
            while waiting and len(running) < suite.at_once:
                task = waiting.pop(0)
                running[task.name] = Process(task, journal, claims)
            time.sleep(0.05)
            last, now = now, time.monotonic()
            gone = {name for name, process in running.items() if process.process.poll() is not None}
            entries, offset = journal.entries(offset)  # after the look at who is gone: their last words are in it
            for process in running.values():
                process.silence += min(1.0, now - last)  # a machine that stood still said nothing either
            for entry in entries:
                if entry.get("worker") in running:
                    running[entry["worker"]].hear(entry)
            for name, process in list(running.items()):
                patience = case_seconds if process.case else process.task.patience
                silent = name not in gone and process.silence > patience
                if silent:
                    process.kill()
                if silent or name in gone:
                    del running[name]
                    if process.close(f"silent for {patience:.0f} s" if silent else None):
                        waiting.insert(0, process.task)
    finally:
        for process in running.values():
            process.kill()
    return None


def results(entries: list[dict]) -> dict:
    """What the journal says, as bench/results/*.json has it."""
    facts = {key: value for entry in entries for key, value in entry.items() if key in ("served", "provenance")}
    done = ends(entries)
    tests = {case: end for case, end in done.items() if case.startswith("tests/")}
    watched = {case: end for case, end in done.items() if re.match(r"(mem|race|init)check ", case)}
    rest = {case: end for case, end in done.items() if case not in tests and case not in watched}
    return {
        "served": facts.get("served"),
        "records": [end["record"] for end in rest.values() if "record" in end],
        "lost": {case: end["why"] for case, end in rest.items() if end["outcome"] == "lost"},
        "tests": _outcomes(tests) | {"provenance": facts.get("provenance")},
        "sanitizer": _outcomes(watched) | {"provenance": facts.get("provenance")},
    }


def _outcomes(done: dict[str, dict]) -> dict:
    """How many passed, and of the others the reason: for the skipped its number, for the rest the case."""
    skipped = Counter(end["why"] for end in done.values() if end["outcome"] == "skipped")
    return {"passed": sum(end["outcome"] == "passed" for end in done.values()), "skipped": dict(skipped)} | {
        outcome: {case: end["why"] for case, end in done.items() if end["outcome"] == outcome}
        for outcome in ("failed", "lost")
    }


def table(entries: list[dict], stopped: dict[str, str]) -> Iterator[str]:
    """One screen: each case beside its limits, what failed, what was lost and what was not done, and why."""
    done = results(entries)
    if made := done["tests"]["provenance"]:
        served = Counter(str(row["cuda"]).partition("/")[2].partition("/")[0] for row in done["served"])
        kernels = f"{served['cuda']} ops by CUDA C++, {served['triton']} by Triton, {served['ops']} by PyTorch"
        yield f"{made['hardware']}; {made['date']}; commit {made['commit']}; {kernels}"
    yield f"{'case':<72} {'ms':>9} {'limit':>9} {'of it':>6} {'of the run':>10}"
    for record in done["records"]:
        yield _row(record)
    for case, why in done["lost"].items():
        yield f"lost: {case}: {_line(why)}"
    for suite in "tests", "sanitizer":
        counts = done[suite]
        number = {outcome: len(counts[outcome]) for outcome in ("failed", "lost")}
        number = {"passed": counts["passed"], "skipped": sum(counts["skipped"].values())} | number
        yield f"{suite}: {', '.join(f'{n} {outcome}' for outcome, n in number.items())}"
        yield from (f"  skipped {n}: {_line(why)}" for why, n in counts["skipped"].items())
        bad = [f"  {x}: {case}: {_line(why)}" for x in ("failed", "lost") for case, why in counts[x].items()]
        yield from bad[:20]
        if len(bad) > 20:
            yield f"  and {len(bad) - 20} more in the journal"
    for suite, why in stopped.items():
        yield f"stopped: {suite}: {why} is over; the same command goes on here"


def _row(record: dict) -> str:
    if "refused" in record:
        return f"refused: {record['case']}: {_line(record['refused'])}"
    ours = next(iter(record["times"].values()))
    limit = limit_ms(record)
    target = f"{limit:>9.4g} {limit / ours['median_ms']:>6.0%}" if limit else f"{'':>16}"
    case = re.sub(r"\w+=", "", record["case"].removesuffix(" cuda"))
    return f"{case:<72} {ours['median_ms']:>9.4g} {target} {ours['of_baseline']:>10.0%}"


def limit_ms(record: dict) -> float | None:
    """The larger of what its bytes and its FLOPs cost at the least on this hardware, where that is known."""
    known = LIMITS.get(record["provenance"]["hardware"])
    return 1e3 * max(record["bytes"] / known[0], record["flops"] / known[1]) if known else None


def _line(text: str) -> str:
    """The last line that says something, which is where Python names the error."""
    return ([line for line in text.splitlines() if line.strip()] or [""])[-1].strip()[:160]


def commit() -> str:
    if "COMMIT" in os.environ or shutil.which("git") is None:
        return os.environ.get("COMMIT", "unknown")
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout or "unknown"


def main(plan: list[Suite] = PLAN) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.slot", description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(s.name for s in plan)}; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing and end all after so many")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the journal; bench/results/slot-COMMIT by default")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if unknown := set(arguments.suites) - {suite.name for suite in plan}:
        parser.error(f"no suite {', '.join(sorted(unknown))}")
    journal = Journal((arguments.out or ROOT / f"bench/results/slot-{commit()[:10]}") / "journal.jsonl")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    stopped: dict[str, str] = {}
    try:
        with tempfile.TemporaryDirectory() as claims:
            for suite in plan:
                if suite.needed or not arguments.suites or suite.name in arguments.suites:
                    begin = time.monotonic()
                    if why := run(suite, journal, claims, deadline):
                        stopped[suite.name] = why
                    print(f"{suite.name}: {time.monotonic() - begin:.0f} s", flush=True)
                    end = ends(journal.entries()[0]).get(suite.name, {})
                    if suite.needed and end.get("outcome") != "finished":
                        print(end.get("output", ""))
                        break
    finally:
        entries = journal.entries()[0]
        print(*table(entries, stopped), sep="\n", flush=True)
    done = results(entries)
    wrong = [
        done["lost"],
        *(done[suite][outcome] for suite in ("tests", "sanitizer") for outcome in ("failed", "lost")),
    ]
    return int(any([stopped, *wrong]) or any("refused" in record for record in done["records"]))


if __name__ == "__main__":
    sys.exit(main())
