"""Coefficients that change from iteration to iteration: what they are, and that the loop trains with them."""

from dataclasses import replace

import pytest

from qrm_fast.rl.coefficients import Coefficients
from qrm_fast.rl.config import Config, preset
from qrm_fast.rl.train import train


@pytest.fixture
def config(checkpoints, tmp_path):
    return Config(
        **preset("qrm-paper", "ppo") | dict(reward="random", value_coef=0.0, kl_coef=0.5),
        model=str(checkpoints / "policy"),
        data=str(checkpoints / "prompts.jsonl"),
        out=str(tmp_path / "run"),
        overwrite=True,
        verifier="arithmetic",
        num_iterations=3,
        num_prompts=2,
        max_new_tokens=4,
        lr=1e-2,
    )


def test_a_straight_line_to_zero(config):
    coefficients = Coefficients(replace(config, anneal="clip_low, kl_coef", num_iterations=4, clip_low=0.2))
    assert [coefficients.at(i).clip_low for i in range(4)] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert [coefficients.at(i).kl_coef for i in range(4)] == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert coefficients.at(3).clip_high == config.clip_high
    assert coefficients.metrics(coefficients.at(1)) == pytest.approx({"policy/clip_low": 0.15, "policy/kl_coef": 0.375})


def test_the_controller_follows_the_kl_by_bounded_steps(config):
    coefficients = Coefficients(replace(config, adaptive_kl=0.1))
    expected = 0.5
    for kl, factor in ((0.11, 1.01), (10.0, 1.02), (0.1, 1.0), (0.0, 0.98), (float("nan"), 1.0), (0.095, 0.995)):
        coefficients.observe(kl)
        expected *= factor
        assert coefficients.at(7).kl_coef == pytest.approx(expected)
    other = Coefficients(replace(config, adaptive_kl=0.1))
    other.load_state_dict(coefficients.state_dict())
    assert other.at(0) == coefficients.at(0)


def test_without_either_the_configuration_is_that_of_every_iteration(config):
    coefficients = Coefficients(config)
    coefficients.observe(3.0)
    assert coefficients.at(2) == config and coefficients.metrics(config) == {}


@pytest.mark.parametrize(
    "where", [dict(kl_in="loss", kl_estimator="k3"), dict(), dict(reward="pure", prm="arithmetic:noise=0.3")], ids=str
)
def test_the_loop_trains_with_what_is_left_of_the_kl(config, where):
    """Half of kl_coef, in the second of two iterations, is half of it from the start where that changes nothing."""
    config = replace(config, **where, num_iterations=2)
    whole, annealed = (train(replace(config, anneal=names)).metrics for names in ("", "kl_coef"))
    assert [row["policy/kl_coef"] for row in annealed] == [0.5, 0.25]
    assert whole[0]["policy/loss"] == annealed[0]["policy/loss"]
    assert whole[1]["policy/ref_kl"] == annealed[1]["policy/ref_kl"] > 1e-3
    name = "policy/loss" if config.kl_in == "loss" else "advantage/mean"
    rest = 0.25 * whole[1]["policy/ref_kl"]
    if config.kl_in == "loss":
        assert whole[1][name] - annealed[1][name] == pytest.approx(rest, rel=1e-3)
    else:  # k1 and k3 are other numbers, and the mean is over other tokens
        assert annealed[1][name] > whole[1][name]


def test_a_steered_kl_resumes_to_the_same_bits(config):
    config = replace(config, adaptive_kl=1e-6, save_every=1)
    whole = train(config).metrics
    assert [row["policy/kl_coef"] for row in whole] == pytest.approx([0.5, 0.49, 0.4998], rel=1e-6)
    parts = replace(config, out=config.out + "2")
    train(replace(parts, num_iterations=2))
    again = train(replace(parts, overwrite=False, resume=True)).metrics
    timed = ("time/", "perf/")
    kept = [[{k: x for k, x in row.items() if not k.startswith(timed)} for row in rows] for rows in (whole, again)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(anneal="lr"), "anneal must name some of kl_coef, entropy_coef, clip_low, clip_high, got lr"),
        (dict(anneal="entropy_coef"), "free to fall, got entropy_coef, which is 0"),
        (dict(anneal="kl_coef", adaptive_kl=0.1), "free to fall, got kl_coef, which adaptive_kl steers"),
        (dict(adaptive_kl=0.1, kl_coef=0.0), "steers kl_coef from where it starts, expected one above 0, got 0"),
        (dict(adaptive_kl=-1.0), "adaptive_kl must be at least 0, got -1"),
    ],
)
def test_bad_input(config, options, message):
    with pytest.raises(ValueError, match=message):
        train(replace(config, **options))
