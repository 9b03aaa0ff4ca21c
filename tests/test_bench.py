"""The harness refuses what it must, and its figures are what they say."""

import json
import os
import sys
import time

import pytest
import torch

from bench import __main__ as command
from bench import harness, render
from bench.provenance import provenance

CPU = torch.device("cpu")


def case_of(monkeypatch, **parts) -> str:
    parts = {"providers": {"ours": lambda: None}, "gate": lambda: None, "limit": {"copy": lambda: None}} | parts
    monkeypatch.setitem(harness.CASES, "a case", harness.Registered("suite", "cpu", lambda: harness.Case(**parts)))
    return "a case"


def test_a_red_gate_leaves_no_figure(monkeypatch):
    def gate():
        raise AssertionError("row 3 is off")

    record = harness.measure(case_of(monkeypatch, gate=gate))
    assert record["refused"] == "the result is wrong: row 3 is off"
    assert "times" not in record
    assert "refused: the result is wrong" in render.table([record | {"provenance": provenance("cpu")}])


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr(harness.OtherCpu, "__call__", lambda self: 0.3)
    with pytest.raises(harness.Busy, match="other processes took 30% of the CPU; kept 0 of 3"):
        harness.interleaved({"ours": lambda: time.sleep(0.01)}, CPU, repeats=3, max_seconds=0.1)
    timings, other = harness.interleaved({"ours": lambda: time.sleep(0.01)}, CPU, repeats=3, allow_busy=True)
    assert len(timings["ours"].ms) >= 3
    assert other == pytest.approx(0.3)


def test_a_busy_machine_leaves_the_last_record(monkeypatch, tmp_path, capsys):
    name = case_of(monkeypatch)
    monkeypatch.setattr(harness, "CASES", {name: harness.CASES[name]})
    monkeypatch.setattr(harness, "extra_mib", lambda *_: 7.0)
    monkeypatch.setattr(sys, "argv", ["bench", "suite", "--only", name, "--out", str(tmp_path)])
    monkeypatch.setattr(harness.OtherCpu, "__call__", lambda self: 0.0)
    assert command.main() == 0
    (path,) = tmp_path.glob("cpu-*.json")
    measured = json.loads(path.read_text())["records"]
    assert measured[0]["times"]["ours"]["extra_mib"] == 7.0

    def busy(*_, **__):
        raise harness.Busy("other processes took 30% of the CPU; kept 0 of 15")

    monkeypatch.setattr(harness, "interleaved", busy)
    assert command.main() == 1
    assert "a case: not measured, other processes took 30% of the CPU" in capsys.readouterr().out
    assert json.loads(path.read_text())["records"] == measured


def test_own_work_is_not_other_work():
    other_cpu = harness.OtherCpu()
    other_cpu.last = tuple(x - y for x, y in zip(other_cpu.last, (1.0, 2.0, 2.0), strict=True))
    assert other_cpu() == pytest.approx(0.0, abs=0.02)
    other_cpu.last = tuple(x - y for x, y in zip(other_cpu.last, (1.0, 2.0, 0.0), strict=True))
    assert other_cpu() == pytest.approx(2.0 / len(os.sched_getaffinity(0)), abs=0.02)


def test_figures_follow_from_the_times(monkeypatch):
    times = {"ours": 4.0, "limit: slow": 3.0, "limit: fast": 2.0}
    timings = {way: harness.Timing([ms] * 5) for way, ms in times.items()}
    monkeypatch.setattr(harness, "interleaved", lambda *_, **__: (timings, 0.05))
    monkeypatch.setattr(harness, "extra_mib", lambda *_: 7.0)
    limit = {"slow": lambda: None, "fast": lambda: None}
    name = case_of(monkeypatch, limit=limit, limits_worth=1.5, bytes=8_000_000, flops=12_000_000)
    rows = harness.measure(name)["times"]
    assert rows["ours"]["of_limit"] == pytest.approx(1.5 * 2.0 / 4.0)
    assert rows["ours"]["gb_per_s"] == pytest.approx(2.0)
    assert rows["ours"]["gflop_per_s"] == pytest.approx(3.0)
    assert rows["ours"]["extra_mib"] == 7.0
    assert rows["limit: fast"]["of_limit"] == pytest.approx(1.0)
    assert rows["limit: fast"]["gflop_per_s"] == pytest.approx(4.0)


def test_extra_memory_is_what_the_call_adds(monkeypatch):
    def ours():
        torch.ones(64 << 20, dtype=torch.uint8)

    assert harness.extra_mib_here(case_of(monkeypatch, providers={"ours": ours}), "ours") == pytest.approx(64, abs=4)


def test_a_new_record_replaces_its_own_and_keeps_the_rest(tmp_path):
    path = tmp_path / "results.json"
    command.write(path, {"records": [{"case": "a", "ms": 1}, {"case": "b", "ms": 2}], "tests": {"tests": 3}})
    command.write(path, {"records": [{"case": "b", "ms": 4}]})
    command.write(path, {"served": []})
    assert json.loads(path.read_text()) == {
        "records": [{"case": "a", "ms": 1}, {"case": "b", "ms": 4}],
        "tests": {"tests": 3},
        "served": [],
    }


def test_unmeasured_figures_say_so(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- bench: no such case -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    render.into_docs()
    text = "before\n<!-- bench: no such case -->\nnot measured\n<!-- end -->\nafter\n"
    assert (tmp_path / "README.md").read_text() == text
