"""The harness refuses what it must, and its figures are what they say."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
import zipfile
from functools import partial

import pytest
import torch

import qrm_fast
from bench import __main__ as command
from bench import (
    bench_advantages,
    bench_heads,
    bench_models,
    conftest,  # which imports every suite: one imported under a test's own registry would register there alone
    growth,
    harness,
    pictures,
    render,
    rivals,
)
from bench.bench_update import known_peaks
from bench.compare import compare
from bench.provenance import ROOT, provenance
from bench.shares import LIBRARIES, REST, shares

CPU = torch.device("cpu")


def case_of(monkeypatch, **parts) -> str:
    parts = {"providers": {"ours": lambda: None}, "gate": lambda: None, "baseline": {"copy": lambda: None}} | parts
    monkeypatch.setitem(conftest.CASES, "a case", harness.Registered("suite", "cpu", lambda: harness.Case(**parts)))
    return "a case"


def test_a_red_gate_leaves_no_figure(monkeypatch):
    def gate():
        raise AssertionError("row 3 is off")

    record = harness.measure(case_of(monkeypatch, gate=gate))
    assert record["refused"] == "the result is wrong: row 3 is off"
    assert "times" not in record
    assert "refused: the result is wrong" in render.table([record | {"provenance": provenance("cpu")}])


def test_ours_that_raises_leaves_no_figure(monkeypatch):
    def ours():
        raise MemoryError("64 GiB asked\nat line 3")

    record = harness.measure(case_of(monkeypatch, providers={"ours": ours}))
    assert record["refused"] == "MemoryError: 64 GiB asked" and "times" not in record


def test_a_rival_that_raises_is_absent(monkeypatch):
    def slow():
        raise MemoryError("64 GiB asked")

    monkeypatch.setattr(harness, "extra_mib", lambda *_: 7.0)
    monkeypatch.setattr(harness.OtherCpu, "__call__", lambda self: 0.0)
    providers = {"ours": lambda: 3.0, "theirs": lambda: 5.0, "another": slow}
    name = case_of(monkeypatch, providers=providers, absent={"a third": "no module"}, error=lambda way, x: x - 3)
    record = harness.measure(name)
    assert record["times"].keys() == {"ours", "theirs", "copy"}
    assert record["times"]["ours"]["error"] == 0 and record["times"]["theirs"]["error"] == 2
    table = render.table([record | {"provenance": provenance("cpu")}])
    assert "Absent: a third (no module); another (MemoryError: 64 GiB asked)." in table
    assert "| extra MiB | error |" in table


def test_an_error_that_cannot_be_had_leaves_the_figures(monkeypatch):
    def error(way, result):
        raise TypeError("x must not be float64 on CUDA")

    monkeypatch.setattr(harness, "extra_mib", lambda *_: 7.0)
    monkeypatch.setattr(harness.OtherCpu, "__call__", lambda self: 0.0)
    record = harness.measure(case_of(monkeypatch, error=error))
    assert record["times"]["ours"]["extra_mib"] == 7.0 and "error" not in record["times"]["ours"]
    assert record["absent"] == {"error of ours": "TypeError: x must not be float64 on CUDA"}


def test_mfu_is_over_what_was_measured_and_what_the_data_sheet_says(monkeypatch):
    for name, peaks in (("NVIDIA H200", [788e12, 989e12]), ("NVIDIA H100 80GB HBM3", [989e12]), ("another", [])):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert list(known_peaks(torch.device("cuda")).values()) == peaks


def test_what_else_a_way_measured_has_columns_of_its_own(monkeypatch):
    monkeypatch.setattr(harness, "extra_mib", lambda *_: 7.0)
    monkeypatch.setattr(harness.OtherCpu, "__call__", lambda self: 0.0)
    providers = {"ours": lambda: None, "theirs": lambda: None}
    details = {"ours": {"update, s": 1.5}, "theirs": {"update, s": 3.25, "wait, s": 2000.0}}
    machine = {"copy": 3e9}
    record = harness.measure(case_of(monkeypatch, providers=providers, details=details.get, machine=lambda: machine))
    assert record["machine"] == machine
    assert record["times"]["theirs"]["details"] == details["theirs"] and "details" not in record["times"]["copy"]
    table = render.table([record | {"provenance": provenance("cpu")}])
    assert "| update, s | wait, s | time, ours = 1 |" in table
    assert "| 1.5 |  | 1 |" in table and "| 3.25 | 2,000 |" in table


def test_every_way_is_warm_before_it_is_timed(monkeypatch):
    calls = {"ours": [], "theirs": [], "copy": []}
    ways = {name: partial(called.append, None) for name, called in calls.items()}
    monkeypatch.setattr(harness, "extra_mib", lambda *_: 7.0)

    def timed(providers, *_, **__):
        assert providers.keys() == calls.keys() and all(calls.values())
        return {name: harness.Timing([1.0, 2.0]) for name in providers}, 0.0

    monkeypatch.setattr(harness, "interleaved", timed)
    parts = {"providers": {name: ways[name] for name in ("ours", "theirs")}, "baseline": {"copy": ways["copy"]}}
    assert "refused" not in harness.measure(case_of(monkeypatch, **parts))


def test_a_tree_without_git_names_its_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("COMMIT", "0123abc")
    assert {"commit": "0123abc", "dirty": None}.items() <= provenance("cpu").items()
    monkeypatch.delenv("COMMIT")
    assert {"commit": None, "dirty": None}.items() <= provenance("cpu").items()


def test_rivals_come_from_wheels_or_are_absent(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "peer_of_ours-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_ours.py", "def head(): return 3")
        wheel.writestr("peer_of_ours-1.2.dist-info/METADATA", "Name: peer-of-ours\nVersion: 1.2\n")
    monkeypatch.setenv("PEERS", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    peers = importlib.reload(rivals)
    there, absent = peers.available(
        [
            peers.Rival("peer-of-ours", "a head", lambda: importlib.import_module("peer_of_ours").head),
            peers.Rival("nowhere", "another", lambda: importlib.import_module("nowhere")),
        ]
    )
    assert {name: head() for name, head in there.items()} == {"peer-of-ours 1.2, a head": 3}
    assert absent == {"nowhere, another": "No module named 'nowhere'"}


def test_shares_of_a_step():
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(5000, 32, requires_grad=True)
    x, targets, cu_seqlens = torch.randn(600, 600), torch.zeros(64, dtype=torch.int64), torch.tensor([0, 600])

    def step():
        for _ in range(20):
            qrm_fast.linear_policy_loss(hidden, weight, targets, torch.ones(64), kind="reinforce").loss.backward()
            qrm_fast.gae(x[0], x[1], cu_seqlens)
            x @ x

    got = shares(step)
    assert list(got)[2:] == [*LIBRARIES, REST] and sum(got.values()) == pytest.approx(1)
    assert got["linear_policy_loss"] > got["gae"] > 0 and got["linear layers"] > 0.01 > got["attention"] == 0
    record = {"case": "step[width=8] cpu", "device": "cpu", "shares": got, "provenance": provenance("cpu")}
    text = render.shares(
        [record, record | {"case": "step[width=9] cpu", "shares": {"linear_sample": 0.25, REST: 0.75}}]
    )
    assert "|  | width 8 (1) | width 9 (1) |" in text and "| - `linear_sample` |  | 25.0% |" in text
    assert f"| ops of qrm_fast | **{got['linear_policy_loss'] + got['gae']:.1%}** | **25.0%** |" in text
    assert "attention" not in text
    (axes,) = pictures.steps([record]).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["width 8"]
    assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(100, abs=0.2)


def test_gae_of_a_program_per_row(monkeypatch):
    """The signature of rl-triton 0.1.3, which runs on CUDA alone, and what its guide says it computes."""

    def compute_gae(rewards, values, terminateds, *, gamma, lambda_):
        after, carried = 1 - terminateds, torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        advantages, next_one = rewards + gamma * after * carried - values, torch.zeros(len(values))
        for t in reversed(range(values.shape[1])):
            next_one = advantages[:, t] = advantages[:, t] + gamma * lambda_ * after[:, t] * next_one
        return advantages

    monkeypatch.setitem(sys.modules, "rl_triton", types.SimpleNamespace(compute_gae=compute_gae))
    lengths = torch.tensor([5, 1, 3])
    real = torch.arange(5) < lengths[:, None]
    rewards, values = torch.where(real, torch.randn(2, 3, 5), 0.0)
    got = bench_advantages.rl_triton()(rewards, values, real)()
    cu_seqlens = torch.tensor([0, 5, 6, 9])
    want = qrm_fast.gae(rewards[real], values[real], cu_seqlens, gamma=1.0, lam=0.95)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x[real], y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_head_computes_the_same(dtype):
    """At a small shape, where ours is exact and no way is off by more than bfloat16 logits are."""
    shape = {"num_tokens": 64, "dim": 32, "vocab": 300}
    for build in (
        bench_heads.linear_logprobs_forward,
        bench_heads.linear_logprobs_forward_backward,
        bench_heads.linear_policy_loss_forward_backward,
    ):
        case = build(CPU, dtype, **shape)
        case.gate()
        errors = {way: case.error(way, provider()) for way, provider in case.providers.items()}
        assert len(errors) > 1 and max(errors.values()) < (1e-5 if dtype == "float32" else 0.2)
        assert errors["qrm_fast"] <= (1e-5 if dtype == "float32" or "forward_" not in build.__name__ else 4e-3)


@pytest.mark.parametrize("model", bench_models.MODELS)
def test_the_step_of_a_model_has_the_gradients_of_autograd(model):
    case = bench_models.model_head(CPU, model, "float32", num_tokens=64, dim=32, vocab=300)
    case.gate()
    ours, theirs = (provider() for provider in case.providers.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_lengths_are_those_that_are_named(monkeypatch, tmp_path):
    pairs = [{"chosen": "1 + 1 = 2.", "rejected": "1 + 1 is three"}, {"chosen": "no", "rejected": "a-b"}]
    (tmp_path / "gsm8k_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setenv("DATA", str(tmp_path))
    lengths = bench_advantages.boundaries(bench_advantages.REAL, 40).diff().tolist()
    assert lengths == [6, 5, 1, 3] * 2 + [6, 4]
    for segments, median in (("log-normal", 150), ("log-normal, long", 8100)):
        ends = bench_advantages.boundaries(segments, 1 << 24)
        assert ends[-1] == 1 << 24 and ends.diff().median().item() == pytest.approx(median, rel=0.1)
    assert bench_advantages.boundaries("2 x 5", 10).tolist() == [0, 5, 10]


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


def test_a_case_that_needs_an_environment_runs_in_a_process_with_it(monkeypatch):
    case = harness.Registered("suite", "cpu", lambda: None, {"MALLOC_MMAP_MAX_": "0"})
    monkeypatch.setitem(harness.CASES, "a case", case)
    answers = ['{"case": "a case"}', 'a word\n{"busy": "others took 30%"}']

    def run(command, *, env, **_):
        assert command[-3:] == ["--measure", "a case", "--busy"] and env["MALLOC_MMAP_MAX_"] == "0"
        return types.SimpleNamespace(stdout=answers.pop(0))

    monkeypatch.setattr(harness.subprocess, "run", run)
    assert harness.measure("a case", allow_busy=True) == {"case": "a case"}
    with pytest.raises(harness.Busy, match="others took 30%"):
        harness.measure("a case", allow_busy=True)


def test_own_work_is_not_other_work():
    other_cpu = harness.OtherCpu()
    other_cpu.last = tuple(x - y for x, y in zip(other_cpu.last, (1.0, 2.0, 2.0), strict=True))
    assert other_cpu() == pytest.approx(0.0, abs=0.02)
    other_cpu.last = tuple(x - y for x, y in zip(other_cpu.last, (1.0, 2.0, 0.0), strict=True))
    assert other_cpu() == pytest.approx(2.0 / len(os.sched_getaffinity(0)), abs=0.02)


def test_figures_follow_from_the_times(monkeypatch):
    times = {"ours": 4.0, "slow": 3.0, "fast": 2.0}
    timings = {way: harness.Timing([ms] * 5) for way, ms in times.items()}
    monkeypatch.setattr(harness, "interleaved", lambda *_, **__: (timings, 0.05))
    monkeypatch.setattr(harness, "extra_mib", lambda *_: 7.0)
    baseline = {"slow": lambda: None, "fast": lambda: None}
    name = case_of(monkeypatch, baseline=baseline, num_baselines=1.5, bytes=8_000_000, flops=12_000_000)
    rows = harness.measure(name)["times"]
    assert rows["ours"]["of_baseline"] == pytest.approx(1.5 * 2.0 / 4.0)
    assert rows["ours"]["gb_per_s"] == pytest.approx(2.0)
    assert rows["ours"]["gflop_per_s"] == pytest.approx(3.0)
    assert rows["ours"]["extra_mib"] == 7.0
    assert rows["fast"]["of_baseline"] == pytest.approx(1.0)
    assert rows["fast"]["gflop_per_s"] == pytest.approx(4.0)


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


def record_of(case, ours, theirs, *, machine="one", baseline=0.5, flops=0, **more):
    """Of ours in two ways, two rivals and a baseline, by their milliseconds."""
    row = {"p20_ms": 1.0, "p80_ms": 1.5, "gb_per_s": 3.0, "gflop_per_s": 5.0}
    ways = {"qrm_fast": ours, "qrm_fast, in two": 1.0, "slower": theirs + 1, "theirs": theirs}
    times = {way: row | {"median_ms": ms, "extra_mib": 2.0, "of_baseline": baseline / ms} for way, ms in ways.items()}
    times["library"] = row | {"median_ms": baseline, "of_baseline": 1.0}
    made = provenance("cpu") | {"hardware": machine, "commit": "0123456789abcdef", "dirty": False}
    record = {"case": case, "suite": "", "device": "cpu", "bytes": 10, "flops": flops, "times": times}
    return record | {"provenance": made} | more


BEFORE = record_of("sum[x=1] cpu", 3.0, 6.0)


@pytest.mark.parametrize(
    "now, fine",
    [
        (record_of("sum[x=1] cpu", 3.0, 6.0), True),
        (record_of("sum[x=1] cpu", 3.6, 6.0), False),
        (record_of("sum[x=1] cpu", 3.4, 6.0), True),  # within 15 %
        (record_of("sum[x=1] cpu", 30.0, 60.0, machine="slow", baseline=5.0), True),
        (record_of("sum[x=1] cpu", 3.0, 6.0, baseline=0.4), True),  # the copy alone was faster
        (record_of("sum[x=1] cpu", 3.6, 9.0), True),  # the rival became slower still, so the machine may have
        ({"case": "sum[x=1] cpu", "refused": "the result is wrong"}, False),
        (record_of("sum[x=2] cpu", 3.0, 6.0), False),  # nothing to compare with
    ],
)
def test_ours_is_compared_beside_what_ran_with_it(now, fine):
    text, said = compare([now], [BEFORE])
    assert said == fine
    assert ("| slower |" in text) == (now.get("times", {}).get("qrm_fast", {}).get("median_ms") == 3.6 and not fine)


def test_without_a_rival_in_both_the_baseline_decides():
    other = record_of("sum[x=1] cpu", 3.6, 6.0)
    other["times"] = {way.replace("theirs", "new").replace("slower", "newer"): x for way, x in other["times"].items()}
    text, fine = compare([other], [BEFORE])
    assert not fine and "| `sum[x=1] cpu` | 1.20 |  | slower |" in text


def test_a_slow_down_of_a_case_fails_the_command(monkeypatch, tmp_path, capsys):
    name = case_of(monkeypatch, providers={"qrm_fast": lambda: None})
    monkeypatch.setattr(harness, "CASES", {name: harness.CASES[name]})
    monkeypatch.setattr(harness, "extra_mib", lambda *_: 7.0)
    timings = {"qrm_fast": harness.Timing([4.0] * 5), "copy": harness.Timing([2.0] * 5)}
    monkeypatch.setattr(harness, "interleaved", lambda *_, **__: (timings, 0.0))
    monkeypatch.setattr(sys, "argv", ["bench", "suite", "--out", str(tmp_path)])
    assert command.main() == 0
    (path,) = tmp_path.glob("*.json")
    committed = path.read_text()
    monkeypatch.setattr(sys, "argv", ["bench", "suite", "--out", str(tmp_path), "--compare", str(path)])
    assert command.main() == 0
    timings["qrm_fast"] = harness.Timing([5.0] * 5)
    assert command.main() == 1
    assert "| `a case` | 1.25 |  | slower |" in capsys.readouterr().out
    assert path.read_text() == committed


def test_exponents_are_those_of_the_records():
    cases = [(f"product[dtype=float32, x={x}, y=8] cpu", x) for x in (4, 1, 2)]
    records = [record_of(case, 3.0 * x**1.5, 6.0 * x) for case, x in cases]
    records += [record_of("product[dtype=float32, x=4, y=9] cpu", 1.0, 1.0)]  # two are no sweep
    (sweep,) = growth.sweeps(records)
    assert (sweep.op, sweep.over, sweep.sizes) == ("product", "x", [1, 2, 4])
    assert sweep.exponent("qrm_fast", "median_ms") == pytest.approx(1.5)
    assert sweep.exponent("theirs", "extra_mib") == pytest.approx(0)
    assert sweep.exponent("nobody", "median_ms") is None
    assert "| `product` | x 1 to 4 | qrm_fast | 1.50 | 0.00 | 1 |" in render.growth(records)


def test_the_cost_model_stands_beside_what_was_measured(monkeypatch):
    record = record_of("training_step[num_answers=8, prompt=8, width=128, num_layers=1] cpu", 2000.0, 6.0)
    record["times"]["qrm_fast"]["details"] = {"sampling, s": 0.5, "update, s": 1.25}
    rates = dict.fromkeys(("products", "head", "attention", "copy", "thin", "sample"), 1e10)
    before = render.cost_model([record | {"machine": rates | {"call": 1e-6, "memory": 1e10}}])
    after = render.cost_model([record | {"machine": dict.fromkeys(rates, 2e10) | {"call": 5e-7, "memory": 1e10}}])
    for what, seen in (("sampling, s", "0.5"), ("update, s", "1.25"), ("step, s", "2"), ("memory, MiB", "2")):
        said = [re.search(rf"\| {what} \| {seen} \| (\S+) \| (\S+) \|", text) for text in (before, after)]
        ours, faster = (float(match[1].replace(",", "")) for match in said)
        assert float(said[0][2]) == pytest.approx(ours / float(seen), rel=0.1, abs=0.005)
        assert faster == pytest.approx(ours / (1 if what == "memory, MiB" else 2), rel=1e-2)


def test_shapes_are_read_from_names():
    assert growth.shape("f[answers=one of half, 128 each, dim=3] cpu") == (
        "f",
        {"answers": "one of half, 128 each", "dim": "3"},
    )


@pytest.fixture
def written(tmp_path, monkeypatch):
    """What into_docs makes of a README with records of two machines."""
    for machine in ("one", "two"):
        cases = [("product[x=1] cpu", 4.0, 8.0, 100), ("sum[x=1] cpu", 3.0, 6.0, 0)]
        records = [
            record_of(case, ours, theirs, machine=machine, flops=flops, baseline=1.25 * ours)
            for case, ours, theirs, flops in cases
        ]
        command.write(tmp_path / f"bench/results/cpu-{machine}.json", {"records": records})
    (tmp_path / "docs/pictures").mkdir(parents=True)
    monkeypatch.setattr(render, "ROOT", tmp_path)

    def render_it(text):
        (tmp_path / "README.md").write_text(f"before\n{text}\nold\n<!-- end -->\nafter\n")
        render.into_docs()
        return (tmp_path / "README.md").read_text()

    return render_it


def test_tables_say_beside_what_a_figure_stands(written):
    text = written("<!-- bench: product -->")
    assert text.count("`product[x=1] cpu`") == 2 and "| of the fastest library GEMM |" in text
    assert "of a copy" not in text and "| qrm_fast | 4 | 5 | 125.0% |" in text
    text = written("<!-- bench: sum -->")
    assert "| of a copy |" in text and "GEMM" not in text


def test_rows_hold_ours_beside_the_fastest_other_way(written):
    text = written("<!-- rows: product; sum; on two -->")
    assert "| `product` x=1 | 4 (1 to 1.5) | 5 GFLOP/s | 125% | 2.0 | theirs | 8 | 2.0 | 1 |" in text
    assert "| `sum` x=1 | 3 (1 to 1.5) | 3 GB/s | 125% * | 2.0 | theirs | 6 | 2.0 | 1 |" in text
    assert "\n1. two; " in text and "commit 0123456789" in text and "one" not in text
    assert "\n2. two; " in written("<!-- rows: product; sum -->")


@pytest.mark.parametrize(
    "mark",
    [
        "<!-- bench: no such case -->",
        "<!-- rows: product; no such case -->",
        "<!-- rows: product; on three -->",
        "<!-- growth -->",
        "<!-- cost model -->",
        "<!-- shares: sum -->",
        "<!-- picture: errors -->",
    ],
)
def test_unmeasured_figures_say_so(written, mark):
    assert written(mark) == f"before\n{mark}\nnot measured\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_pictures_are_the_same_bytes_twice_and_name_their_source(tmp_path, kind):
    sizes = [record_of(f"many[x={x}] cpu", 3.0, 6.0, suite="growth") for x in (1, 2, 4)]
    one, two = (record_of(f"{name}[x=1] cpu", 3.0, 6.0, flops=flops) for name, flops in (("a", 0), ("b", 9)))
    one["times"]["copy of the same bytes"] = one["times"].pop("library")
    two["times"]["qrm_fast"]["error"], two["shares"] = 1e-6, {"gae": 0.25, REST: 0.75}
    drawn = [
        pictures.draw(kind, ROOT / "bench/results/cpu-one.json", [*sizes, one, two], tmp_path).read_bytes()
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and b"cpu-one.json: one; commits 0123456" in drawn[0]


STAND_INS = """
from bench import conftest, harness  # conftest first: it registers the cases that are taken away here

def case(**parts):
    return lambda: harness.Case(**{"gate": lambda: None, "baseline": {"copy": lambda: None}} | parts)

def wrong():
    raise AssertionError("row 3 is off")

def slow():
    raise MemoryError("64 GiB asked")

harness.CASES.clear()
harness.CASES.update({
    "right": harness.Registered("", "cpu", case(
        providers={"qrm_fast": lambda: None, "slow": slow}, absent={"theirs": "No module named 'theirs'"})),
    "wrong": harness.Registered("", "cpu", case(providers={"qrm_fast": lambda: None}, gate=wrong)),
    "elsewhere": harness.Registered("", "cpu", case(providers={}), {"A_SETTING": "0"}),
    "broken": harness.Registered("", "cpu", slow),
    "on a GPU": harness.Registered("", "none such", slow),
})
"""


def test_pytest_benchmark_runs_the_cases(tmp_path):
    """A group per case, a benchmark per way; skipped where absent, failed where wrong, with no figure."""
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    command = [sys.executable, "-m", "pytest", "bench", "-p", "stand_ins", "--benchmark-only"]
    command += ["-rsf", "-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'figures.json'}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # this may be a worker of xdist
    environment |= {"COLUMNS": "120", "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    figures = json.loads((tmp_path / "figures.json").read_text())["benchmarks"]
    assert [(x["group"], x["name"]) for x in figures] == [("right", "qrm_fast"), ("right", "copy")]
    summary = "\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "SKIPPED")))
    for line in (
        "No module named 'theirs'",
        "needs a process started with A_SETTING=0",
        "test_case[right] slow - MemoryError: 64 GiB asked",
        "test_case[wrong] qrm_fast - AssertionError: row 3 is off",
        "test_case[wrong] copy - AssertionError: row 3 is off",
        "test_case[broken] - MemoryError: 64 GiB asked",
    ):
        assert line in summary
