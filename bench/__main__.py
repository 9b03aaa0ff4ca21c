"""Run the suites, print their tables, write one JSON; or, with --render, write the tables into README and docs."""

import argparse
import gc
import importlib
import json
import os
import re
import sys
from pathlib import Path

import torch

from qrm_fast import doctor

from . import harness, render
from .compare import compare
from .journal import Journal, Worker, leave_if_lost
from .provenance import ROOT, provenance
from .slot import OUTCOMES, results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="X of bench/bench_X.py; all when none is named")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--busy", action="store_true", help="report on a busy CPU too; the record says how busy")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(os.environ.get("OUT", ROOT / "bench/results")))
    parser.add_argument("--render", action="store_true", help="write the tables of bench/results into README and docs")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="write nothing; fail where ours is 15 %% slower than FILE has it"
    )
    parser.add_argument("--adopt", type=Path, nargs="+", metavar="DIR", help="take results from the journals of slots")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.render:
        render.into_docs()
        return 0
    if arguments.adopt:
        adopt(arguments.adopt, arguments.out)
        return 0
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if not arguments.worker or path.stem.removeprefix("bench_") in arguments.suites:
            importlib.import_module(f"{__package__}.{path.stem}")
    if arguments.measure:
        try:
            record = harness.measure(arguments.measure, allow_busy=arguments.busy)
        except harness.Busy as busy:
            record = {"busy": str(busy)}
        print(json.dumps(record))
        return 0
    if arguments.memory:
        print(harness.extra_mib_here(*arguments.memory))
        return 0
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device; name a Python that does: make gpu PYTHON=...")
        return 1
    made = provenance(arguments.device)
    names = [
        name
        for name, case in harness.CASES.items()
        if case.device == arguments.device
        and case.suite in (arguments.suites or [case.suite])
        and arguments.only in name
    ]
    if arguments.worker:
        return journaled(names, Worker(), made)
    before = json.loads(arguments.compare.read_text())["records"] if arguments.compare else None
    path = arguments.out / file_name(arguments.device, made)
    if before is None:
        write(path, {"served": [row._asdict() for row in doctor.served()]})
    status, records = 0, []
    for name in names:
        try:
            record = harness.measure(name, allow_busy=arguments.busy) | {"provenance": made}
        except harness.Busy as busy:
            print(f"{name}: not measured, {busy}", flush=True)
            status = 1
            continue
        print(render.table([record]), flush=True)
        records.append(record)
        if before is None:
            write(path, {"records": [record]})  # one by one: a run cut short keeps what it measured
        status |= "refused" in record
    if not names:
        print(f"no case of {arguments.suites or 'any suite'} matches on {arguments.device}")
        return 1
    if before is None:
        print(f"wrote {path}")
        return int(status)
    text, fine = compare(records, before)
    print(text)
    return int(status or not fine)


def journaled(names: list[str], worker: Worker, made: dict) -> int:
    """The cases that the journal of a slot has no end of."""
    worker.journal.write(provenance=made, served=[row._asdict() for row in doctor.served()])
    for name in names:
        if name not in worker.settled:
            worker.begin(name)
            record = harness.measure(name) | {"provenance": made}
            print(render.table([record]), flush=True)
            outcome = "refused" if "refused" in record else "measured"
            worker.end(name, outcome, why=record.get("refused"), record=record)
            leave_if_lost()
            gc.collect()  # the tensors of a case are in cycles of its closures
            torch.cuda.empty_cache()
    return 0


def adopt(folders: list[Path], out: Path) -> None:
    """Write what slots of one machine did into its file of results; of a case that several did, the last one's.

    What they did not touch stays as the file has it. Raises FileNotFoundError for a folder without a journal.
    """
    journals = [Journal((folder / "journal.jsonl").resolve(strict=True)) for folder in folders]
    done = results([entry for journal in journals for entry in journal.entries()[0]])
    made = done["tests"]["provenance"]
    if made is None:
        raise ValueError(
            f"{', '.join(map(str, folders))} must hold a suite of benchmarks, whose records name the machine"
        )
    idle = [suite for suite in ("tests", "sanitizer") if not any(done[suite][x] for x in OUTCOMES)]
    write(out / file_name("cuda", made), {key: value for key, value in done.items() if key not in idle})


def file_name(device: str, made: dict) -> str:
    return f"{device}-{re.sub('[^a-z0-9]+', '-', made['hardware'].lower()).strip('-')}.json"


def write(path: Path, result: dict) -> None:
    """Update the file: a new record takes the place of the one of its case, the others stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    records = {record["case"]: record for each in (old, result) for record in each.get("records", [])}
    path.write_text(json.dumps(old | result | {"records": list(records.values())}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
