"""The PRM of the embedded task that knows the labels, on written answers."""

from statistics import mean, stdev

import pytest

from qrm_fast import pack, prm_rewards
from qrm_fast.rl.arithmetic import arithmetic_tokenizer
from qrm_fast.rl.prm import ends_a_step, find_steps
from qrm_fast.rl.rewards.oracle import ArithmeticPRM
from qrm_fast.rl.tokenizers import encode_prompt, encode_response

TOKENIZER = arithmetic_tokenizer()
PROMPT = "7+6+1+9:"


def judged(spec, answers, seed=0):
    """Rewards of all steps of `answers` to PROMPT, which end with EOS unless with "|"."""
    prompt = encode_prompt(TOKENIZER, PROMPT)
    responses = [encode_response(TOKENIZER, a.removesuffix("|"))[: -1 if a.endswith("|") else None] for a in answers]
    batch = pack([prompt + response for response in responses], [len(prompt)] * len(answers))
    batch, step_ends = find_steps(batch, ends_a_step(TOKENIZER), TOKENIZER.convert_tokens_to_ids("\n\n"))
    return prm_rewards(ArithmeticPRM(spec, TOKENIZER, seed)(batch, step_ends)).tolist()


def test_a_step_is_worth_what_its_label_says():
    answers = [
        "07+6=13\n\n13+1=14\n\n14+9=23\n\n#23",
        "?\n\n07+6=03\n\n03+1=04\n\n04+9=13\n\n#13",
        "",
        "07+6=13\n\n13+1=1|",  # cut: the last token closes the step in the PRM's input
    ]
    signs = [1, 1, 1, 1, 1, -1, 1, 1, 1, -1, 1, -1]
    assert judged("arithmetic", answers) == pytest.approx([0.9 * sign for sign in signs], abs=1e-5)
    assert judged("arithmetic:empty=0.5", answers)[9] == pytest.approx(0.5, abs=1e-5)


def test_noise_is_normal_and_belongs_to_the_text():
    answers = ["\n\n".join(["?"] * 40)] * 2 + ["\n\n".join(["?"] * 39)]
    noisy = judged("arithmetic:noise=0.04", answers)
    assert noisy[:40] == noisy[40:80] and noisy[80:] == noisy[:39]
    assert judged("arithmetic:noise=0.04", answers, seed=1) != noisy
    assert mean(noisy[:40]) == pytest.approx(0.9, abs=0.03) and 0.02 < stdev(noisy[:40]) < 0.06
    assert max(map(abs, judged("arithmetic:noise=9", answers))) < 1


@pytest.mark.parametrize("spec", ["arithmetic:noise", "arithmetic:noise=-1", "arithmetic:empty=2", "arithmetic:x=1"])
def test_other_specs_are_refused(spec):
    with pytest.raises(ValueError, match=r"prm must be such as arithmetic:noise=0\.3,empty=0\.9, got"):
        ArithmeticPRM(spec, TOKENIZER, 0)
