"""Figures: which metrics become which lines, and which token gets which colour and place."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from qrm_fast.rl.plots import WIDE, Answer, _lay_out, curves, first_difference, heat_map, read_runs

POLICY = [
    {"step": 0, "eval/pass@1_sampled": 0.4, "eval/pass@1_greedy": 0.3},
    {
        "step": 1,
        "reward/q_mean": -3.0,
        "policy/approx_kl": 0.0,
        "policy/ref_kl": 0.0,
        "perf/rollout_tokens_per_s": 1500.0,
    },
    {"step": 2, "reward/q_mean": -2.0, "policy/approx_kl": 0.1, "policy/ref_kl": 0.0, "eval/pass@1_sampled": 0.5},
]
SFT = [{"step": i, "sft/loss": 3.0 - i} for i in range(3)]


def panels(figure: Figure):
    """The drawn panels by title."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}


def lines(axes):
    return {(line.get_color(), line.get_linestyle()): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_every_metric_that_occurs_is_drawn_and_no_other():
    drawn = panels(curves({"seed0/policy": POLICY, "seed0/sft": SFT}))
    assert list(drawn) == ["Pass@1", "Reward: Q of sampled tokens", "KL per token", "SFT loss per token", "Throughput"]
    assert lines(drawn["Pass@1"]) == {("C0", "-"): [(0, 0.4), (2, 0.5)], ("C0", "--"): [(0, 0.3)]}
    assert lines(drawn["Reward: Q of sampled tokens"]) == {("C0", "-"): [(1, -3.0), (2, -2.0)]}
    assert lines(drawn["KL per token"]) == {
        ("C0", "--"): [(1, 0.0), (2, 0.1)]
    }  # without a reference, no distance to it
    assert lines(drawn["SFT loss per token"]) == {("C1", "-"): [(0, 3.0), (1, 2.0), (2, 1.0)]}
    on_policy = [row | {"policy/approx_kl": 1e-14} if "policy/approx_kl" in row else row for row in POLICY]
    assert "KL per token" not in panels(curves({"policy": on_policy}))
    for axes in drawn.values():
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_legend().get_texts()


@pytest.mark.parametrize(
    ("prefix", "title", "what"),
    [("qrm", "Q-RM", "pair"), ("orm", "ORM", "pair"), ("dpo", "DPO", "pair"),
     ("implicit", "Implicit reward model", "answer")],
)  # fmt: skip
def test_every_kind_of_reward_model_has_its_panels(prefix, title, what):
    rows = [{"step": i, f"{prefix}/loss": 2.0 - i, f"{prefix}/accuracy": i / 2} for i in range(2)]
    rows.append({"step": 2, f"{prefix}/heldout_loss": 0.5, f"{prefix}/heldout_accuracy": 0.9})
    drawn = panels(curves({"rm": rows}))
    assert list(drawn) == [title, f"{title} loss per {what}"]
    assert lines(drawn[title]) == {("C0", "-"): [(0, 0.0), (1, 0.5)], ("C0", "--"): [(2, 0.9)]}
    assert lines(drawn[f"{title} loss per {what}"]) == {("C0", "-"): [(0, 2.0), (1, 1.0)], ("C0", "--"): [(2, 0.5)]}


def test_seeds_share_a_colour_and_one_line_of_the_legend():
    runs = {"seed0/policy": POLICY, "seed0/random": POLICY, "seed1/policy": POLICY[1:]}
    axes = panels(curves(runs))["Reward: Q of sampled tokens"]
    assert [line.get_color() for line in axes.lines] == ["C0", "C1", "C0"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean", "policy", "random"]


def test_runs_are_read_from_the_directory_and_below(tmp_path):
    for name, rows in (("seed0/policy", POLICY), ("seed0/sft", SFT)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_runs(tmp_path) == {"seed0/policy": POLICY, "seed0/sft": SFT}
    assert read_runs(tmp_path / "seed0/sft") == {".": SFT}
    curves(read_runs(tmp_path)).savefig(tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").std() > 0
    with open(tmp_path / "seed0/sft/metrics.jsonl", "a") as file:
        file.write('{"step": 3')
    with pytest.raises(ValueError, match=r"sft/metrics.jsonl:4: expected one JSON object per line, got"):
        read_runs(tmp_path)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a metrics.jsonl in .* or below it, found none"):
        read_runs(tmp_path)
    with pytest.raises(ValueError, match="runs must hold metrics of a training, got only mine, step"):
        curves({"a": [{"step": 0, "mine": 1.0}]})
    with pytest.raises(ValueError, match="got only no rows"):
        curves({"a": []})


RIGHT = Answer("right", ["1", "+", "2", "\n\n", "$3", "<eos>"], [0.0, 1.0, -1.0, 0.5, 4.0, 3.0])
WRONG = Answer("wrong", ["1", "+", "2", "\n\n", "$4", "<eos>"], [0.0, 1.0, -1.0, 0.5, -5.0, -2.5])


def boxes(figure):
    """The rectangles of the tokens, of one answer after the other."""
    return figure.axes[0].patches


def test_colour_is_q_and_the_first_different_token_is_framed():
    figure = heat_map("1+2:", [RIGHT, WRONG])
    q = RIGHT.q + WRONG.q
    colours = [to_rgb(box.get_facecolor()) for box in boxes(figure)]
    assert len(colours) == len(q)
    blueness = [blue - red for red, _, blue in colours]
    by_q = sorted(range(len(q)), key=lambda i: q[i])
    assert all(blueness[a] <= blueness[b] for a, b in pairwise(by_q))
    assert colours[0:4] == colours[6:10]  # same tokens, same Q, same colour
    framed = [i for i, box in enumerate(boxes(figure)) if to_rgb(box.get_edgecolor()) == (0, 0, 0)]
    assert framed == [4, 10]
    chart = figure.axes[-1]
    assert [list(line.get_ydata()) for line in chart.lines[:2]] == [RIGHT.q, WRONG.q]
    assert set(chart.lines[2].get_xdata()) == {4}


def test_texts_are_the_prompt_the_titles_and_the_tokens(tmp_path):
    figure = heat_map(r"what is $1 + \frac$", [RIGHT, WRONG])
    texts = [text.get_text() for text in figure.axes[0].texts]
    tokens = ["1", "+", "2", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" * 2]
    assert texts == [
        r"Prompt: what is $1 + \frac$",
        *["right", *tokens, "$3", "<eos>"],
        *["wrong", *tokens, "$4", "<eos>"],
    ]
    figure.savefig(tmp_path / "heat_map.png")  # dollar signs are no mathematics
    assert imread(tmp_path / "heat_map.png").std() > 0


def test_one_answer_long_answers_and_equal_scores():
    one = heat_map("p", [Answer("a", [" word"] * 500, [1.0] * 500)])
    assert len({box.get_facecolor() for box in boxes(one)}) == 1
    assert len(one.axes[-1].lines) == 1
    two = heat_map("p", [Answer(name, [" word"] * 50, [0.0] * 50) for name in "ab"])  # too wide to stand side by side
    assert len({(box.get_x(), box.get_y()) for box in boxes(two)}) == 100


def test_first_difference():
    assert first_difference([RIGHT, WRONG]) == 4
    assert first_difference([RIGHT, RIGHT]) is None
    assert first_difference([RIGHT]) is None
    assert first_difference([Answer("", ["<eos>"], [0.0]), RIGHT]) == 0


@given(st.lists(st.text(st.sampled_from("ab \n\t"), max_size=WIDE), min_size=1, max_size=60))
def test_tokens_keep_their_order_within_the_page_and_never_overlap(tokens):
    placed = _lay_out(tokens, WIDE)
    assert len(placed) == len(tokens)
    end = (0, 0)
    for token in placed:
        assert token.text and "\n" not in token.text
        assert (token.line, token.column) >= end
        assert token.column + len(token.text) <= WIDE
        end = (token.line, token.column + len(token.text))
