"""The laboratory end to end with a step or two per run, and its tables on rows written by hand."""

from dataclasses import replace

import pytest

from qrm_fast.rl import demo as demo_module
from qrm_fast.rl import lab as lab_module
from qrm_fast.rl.arithmetic import arithmetic_demonstration
from qrm_fast.rl.config import check
from qrm_fast.rl.data import Pair, read_rows
from qrm_fast.rl.lab import EXPERIMENTS, GREEDY, SAMPLED, Experiment, Result, cost_of, falls_below_start, lab, table
from qrm_fast.rl.plots import spreads


@pytest.fixture
def small(monkeypatch):
    short = dict(num_iterations=1, num_prompts=4, eval_samples=1, max_new_tokens=8)
    monkeypatch.setattr(demo_module, "SFT", replace(demo_module.SFT, num_steps=2, batch_size=8))
    monkeypatch.setattr(demo_module, "NUM_RL_PROMPTS", 16)
    monkeypatch.setattr(demo_module, "NUM_REPORT_PROMPTS", 8)
    monkeypatch.setattr(lab_module, "Q_RM", replace(lab_module.Q_RM, num_epochs=1))
    monkeypatch.setattr(lab_module, "SHARED", replace(lab_module.SHARED, **short))
    monkeypatch.setattr(lab_module, "LEARNING_RATES", (1e-4, 2e-4))
    monkeypatch.setattr(lab_module, "NUM_EVAL_PROMPTS", 8)
    monkeypatch.setattr(lab_module, "NUM_PAIR_PROMPTS", 12)

    def some_pairs(directory, examples, seed):
        rows = [(e.instruction, arithmetic_demonstration(e.instruction)) for e in examples]
        return [Pair(instruction, right, right[:-1]) for instruction, right in rows], 1.0

    monkeypatch.setattr(lab_module, "sample_pairs", some_pairs)


def test_an_experiment_is_swept_reported_and_not_run_twice(small, tmp_path, monkeypatch):
    names = ("Q-RM, REINFORCE", "DPO-RM, PPO", "ORM, REINFORCE", "Q-RM, flipped pairs")
    whole = EXPERIMENTS["qrm-vs-orm"]
    monkeypatch.setitem(EXPERIMENTS, "few", whole._replace(arms={name: whole.arms[name] for name in names}))
    results = lab("few", seeds=2, out=str(tmp_path))
    assert list(results) == list(names)
    for name, result in results.items():
        assert len(result.runs) == 2
        assert list(result.sweep) == ([] if name == "Q-RM, flipped pairs" else [1e-4, 2e-4])
    assert results["Q-RM, flipped pairs"].lr == results["Q-RM, REINFORCE"].lr
    pairs, flipped = (read_rows(tmp_path / f"start1/{name}.jsonl", Pair) for name in ("pairs", "flipped"))
    assert [(p.chosen, p.rejected) for p in pairs] == [(p.rejected, p.chosen) for p in flipped]
    report, tuning = ((tmp_path / f"start{seed}/eval.jsonl").read_text() for seed in (0, 100))
    assert not set(report.splitlines()) & set(tuning.splitlines())
    assert (tmp_path / "few/table.md").read_text().count("\n") == 2 + len(names)

    monkeypatch.setattr(lab_module, "train", lambda config: pytest.fail("a run was trained twice"))
    assert lab("few", seeds=2, out=str(tmp_path)) == results


def test_arms_are_configurations_that_the_loop_takes():
    for experiment in EXPERIMENTS.values():
        for arm, options in experiment.arms.items():
            assert options.get("lr_of", arm) in experiment.arms
            check(replace(lab_module.SHARED, **{name: x for name, x in options.items() if name != "lr_of"}))


def test_what_the_laboratory_refuses():
    with pytest.raises(ValueError, match=r"experiment must be one of sum-vs-min, .* got which"):
        lab("which")
    with pytest.raises(ValueError, match="seeds must be at least 2, got 1"):
        lab("noise", seeds=1)


def rows_of(*sampled, greedy=0.5):
    """A run evaluated at every second iteration, of 100 tokens per answer, 3 seconds each, one of them evaluation."""
    rows = []
    for step in range(2 * len(sampled) - 1):
        row = {"step": step} if not step else {"step": step, "response/length": 100.0, "time/update_s": 2.0}
        if step % 2 == 0:
            row |= {SAMPLED: sampled[step // 2], GREEDY: greedy, "time/evaluate_s": 1.0}
        rows.append(row)
    return rows


def test_cost_to_a_level_is_read_between_two_evaluations():
    answers = lab_module.SHARED.num_prompts * lab_module.SHARED.group_size
    tokens, seconds = cost_of(rows_of(0.4, 0.5, 0.7), 0.6)
    assert (tokens, seconds) == pytest.approx((3 * 100 * answers, 3 * 2.0))
    assert cost_of(rows_of(0.4, 0.5, 0.5), 0.6) is None
    assert cost_of(rows_of(0.6, 0.5), 0.6) == (0.0, 0.0)


def test_a_fall_below_the_start_is_for_good():
    assert falls_below_start(rows_of(0.4, 0.3, 0.5)[::2]) is None
    assert falls_below_start(rows_of(0.4, 0.3, 0.5, 0.3, 0.2)[::2]) == 6
    assert falls_below_start(rows_of(0.4, 0.4)[::2]) is None


def test_a_table_has_means_and_deviations_over_the_seeds():
    experiment = Experiment("", {"a": {}, "b": {}}, {"response/length": "tokens"}, level=0.6)
    results = {
        "a": Result(1e-4, {5e-5: 0.1, 1e-4: 0.2, 2e-4: 0.15}, [rows_of(0.4, 0.7), rows_of(0.5, 0.9, greedy=0.7)]),
        "b": Result(2e-4, {}, [rows_of(0.4, 0.3), rows_of(0.4, 0.7)]),
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(experiment, results).splitlines()]
    header = dict(zip(lines[0], zip(*lines[2:], strict=True), strict=True))
    assert len({len(line) for line in lines}) == 1
    assert header["sampled Pass@1"] == ("0.800 ± 0.141", "0.500 ± 0.283")
    assert header["greedy Pass@1"] == ("0.600 ± 0.141", "0.500 ± 0.000")
    assert header["gain"] == ("+0.350", "+0.100")
    assert header["lr"] == ("1e-04", "2e-04")
    assert lines[2][1] == "0.100 / 0.200 / 0.150" and lines[3][1] == ""
    assert header["ends below its start"] == ("0 of 2", "1 of 2, from 2")
    assert header["seconds to sampled 0.60"] == ("2", "3 (1 of 2)")  # (8/3 + 1) / 2 and 8/3


def test_a_figure_has_the_mean_and_the_range_of_the_seeds():
    figure = spreads({"a": [rows_of(0.4, 0.7), rows_of(0.5, 0.9)], "b": [rows_of(0.4, 0.3)]}, {SAMPLED: "sampled"})
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([0.45, 0.8]), pytest.approx([0.4, 0.3])]
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == pytest.approx((0.4, 0.9))
