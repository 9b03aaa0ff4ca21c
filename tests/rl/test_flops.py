"""The numerator of MFU, against the textbook's count of a small Llama by hand."""

import pytest

from qrm_fast.rl.flops import update_flops
from qrm_fast.rl.models import load_policy
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.tokenizers import load_tokenizer


def test_the_demo_model_by_hand():
    """Three layers of width 128: four heads of 32, two of keys and values, and a gated feed-forward net of 256."""
    policy = Policy(load_policy("scratch:demo", load_tokenizer("arithmetic")))
    matrices = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    flops, num_ids = update_flops(policy), len(policy.head().weight)
    assert flops.per_token == 6 * matrices  # the embedding is looked up, and the head counts by actions
    assert flops.per_action == 6 * 128 * num_ids
    assert flops.per_pair == 3 * (2 * 3 * 4 * 32 * 2)
    assert flops.total(10, 4, 55) == 60 * matrices + 4 * flops.per_action + 55 * flops.per_pair


def test_frozen_weights_have_no_gradient_to_form():
    peft = pytest.importorskip("peft")
    model = load_policy("scratch:demo", load_tokenizer("arithmetic"))
    whole = update_flops(Policy(model))
    lora = peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = update_flops(Policy(peft.get_peft_model(model, lora)))
    assert adapted.per_token == whole.per_token * 4 / 6 + 6 * 3 * (128 + 128)
    assert adapted.per_action == whole.per_action * 4 / 6 and adapted.per_pair == whole.per_pair
