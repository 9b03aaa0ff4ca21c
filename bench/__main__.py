"""Run the suites, print their tables, write one JSON; or, with --render, write the tables into README and docs."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from qrm_fast import doctor

from . import harness, render
from .provenance import ROOT, provenance


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="X of bench/bench_X.py; all when none is named")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--tests", action="store_true", help="run the tests marked gpu first and record their outcome")
    parser.add_argument("--busy", action="store_true", help="report on a busy CPU too; the record says how busy")
    parser.add_argument("--real-data", type=Path, metavar="DIR", help="passed on to the tests")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(os.environ.get("OUT", ROOT / "bench/results")))
    parser.add_argument("--render", action="store_true", help="write the tables of bench/results into README and docs")
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.render:
        render.into_docs()
        return 0
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
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
    path = arguments.out / f"{arguments.device}-{re.sub('[^a-z0-9]+', '-', made['hardware'].lower()).strip('-')}.json"
    write(path, {"served": [row._asdict() for row in doctor.served()]})
    status = 0
    if arguments.tests:
        tests = gpu_tests(arguments.real_data)
        write(path, {"tests": tests | {"provenance": made}})
        status |= tests["exit_status"] != 0
    num_cases = 0
    for name, registered in harness.CASES.items():
        wanted = not arguments.suites or registered.suite in arguments.suites
        if wanted and registered.device == arguments.device and arguments.only in name:
            num_cases += 1
            try:
                record = harness.measure(name, allow_busy=arguments.busy) | {"provenance": made}
            except harness.Busy as busy:
                print(f"{name}: not measured, {busy}", flush=True)
                status = 1
                continue
            print(render.table([record]), flush=True)
            write(path, {"records": [record]})  # one by one: a run cut short keeps what it measured
            status |= "refused" in record
    if not num_cases:
        print(f"no case of {arguments.suites or 'any suite'} matches on {arguments.device}")
        return 1
    print(f"wrote {path}")
    return int(status)


def write(path: Path, result: dict) -> None:
    """Update the file: a new record takes the place of the one of its case, the others stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    records = {record["case"]: record for each in (old, result) for record in each.get("records", [])}
    path.write_text(json.dumps(old | result | {"records": list(records.values())}, indent=1) + "\n")


def gpu_tests(real_data: Path | None) -> dict:
    """Run `pytest -m gpu`; counts, and the name and message of every failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        data = ["--real-data", str(real_data)] if real_data else []
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", *data]
        status = subprocess.run(command, cwd=ROOT).returncode
        suite = ET.parse(report).getroot()[0]
    failed = {
        f"{test.get('classname')}.{test.get('name')}": bad.get("message")
        for test in suite.iter("testcase")
        for bad in (*test.findall("failure"), *test.findall("error"))
    }
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return counts | {"failed": failed, "exit_status": status, "seconds": float(suite.get("time", 0))}


if __name__ == "__main__":
    sys.exit(main())
